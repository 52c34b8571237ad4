"""What the endpoint's application is given; light, so that a Serve config can be checked without the engines."""

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.resources import ServeScaling
from embedloom.config.serving import ServingConfig


class ApplicationArgs(FrozenConfig):
    """Arguments of ``build``; also the ``args`` of serve/config.yaml."""

    model_folder: str = Field(description="Folder of the model that is served.")
    served_name: str = Field(min_length=1, description="What clients put into `model`.")
    model_id: str | None = Field(
        default=None,
        description="What identifies the weights, such as their artefact's fingerprint. Null: the served name.",
    )
    on_loopback: bool = Field(
        default=False, description="Whether only this machine can connect, where that is known."
    )
    listener: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "Unix socket through which the command that started the endpoint lends its listening socket. "
            "Null: Serve listens."
        ),
    )
    serving: ServingConfig = Field(default=ServingConfig(), description="As the section of a run config.")
    scaling: ServeScaling = Field(default=ServeScaling(), description="As `serve` of a cluster profile.")

    @property
    def fingerprint(self) -> str:
        """What identifies the weights."""
        return self.model_id or self.served_name

    @property
    def single(self) -> bool:
        """Whether one process is encoder and HTTP side at once."""
        return self.scaling.min_replicas == self.scaling.max_replicas == 1

    @model_validator(mode="after")
    def _replicas_may_fill_up(self) -> "ApplicationArgs":
        scales = self.scaling.min_replicas < self.scaling.max_replicas
        ongoing = self.scaling.max_ongoing_requests or self.serving.max_ongoing_requests
        if scales and self.scaling.target_ongoing_requests > ongoing:
            raise ValueError(
                f"scaling.target_ongoing_requests is {self.scaling.target_ongoing_requests:g}, above serving."
                f"max_ongoing_requests {ongoing}, so it would never scale up"
            )
        return self
