"""What holds for a request: its own words, then those of the model name it asks for, then the operator's, then the route's.

Many clients can send nothing but a model's name and texts (Open WebUI, AnythingLLM, Haystack's OpenAI classes, LiteLLM).
For them the one served model has other names, each with a side, a task, an instruction, a way to cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from embedloom.config.serving import ModelAlias, Truncate
from embedloom.errors import ConfigError, DataError
from embedloom.instructions import PromptContract, Side
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.fields import JINA_TASKS
from embedloom.serving.messages import EncodeJob, Part
from embedloom.serving.refusals import ApiError
from embedloom.serving.schemas import TextOptions

_NOTHING = ModelAlias()


@dataclass(frozen=True, slots=True)
class Terms:
    """How one request wants its texts; nothing is left open."""

    model: str  # as the client named it
    side: Side
    task: str | None  # None: the model's default task
    instruction: str | None
    truncate: Truncate
    own_ids_only: bool

    def texts(self, texts: list[str], side: Side, name: str, is_list: bool = True) -> Part:
        """Texts of one side of the request, from the field ``name``."""
        return Part(side, texts, None, self.task, self.instruction, name, is_list)

    def ids(self, token_ids: list[list[int]], name: str) -> Part:
        """Token ids of the request, which carry no prompt."""
        return Part(self.side, None, token_ids, name=name)

    def job(
        self, *parts: Part, contract_hash: str | None = None, fingerprint: str | None = None
    ) -> EncodeJob:
        """The request for the encoder."""
        return EncodeJob(parts, self.truncate, contract_hash, fingerprint, self.own_ids_only)


def terms_of(request: TextOptions, settings: EndpointSettings) -> Terms:
    """The terms of a request.

    A request's own ``task`` also sets aside the instruction of its model name, which belongs to another task.

    Raises:
        ApiError: 404, a model that is not served.
    """
    name = getattr(request, "model", None) or settings.served_name
    alias = alias_of(name, settings)
    own_side, own_task = request.prompt_said
    side, task = JINA_TASKS.get(alias.task or "", (None, alias.task))
    truncate = (
        request.truncation_said or alias.truncate or settings.truncate or type(request).usual_truncation
    )
    return Terms(
        model=name,
        side=own_side or alias.side or side or "document",
        task=own_task or task,
        instruction=request.instruction or (None if own_task else alias.instruction),
        truncate="start" if truncate == "end" and request.cuts_start else truncate,
        own_ids_only=settings.token_ids == "refuse",
    )


def alias_of(name: str, settings: EndpointSettings) -> ModelAlias:
    """What a model name stands for; nothing where it is the served name itself.

    Raises:
        ApiError: 404, neither of them.
    """
    if name == settings.served_name:
        return _NOTHING
    if (alias := settings.models.get(name)) is not None:
        return alias
    allowed = ", ".join(map(repr, (settings.served_name, *settings.models)))
    raise ApiError(
        404,
        f"model: {name!r:.80} is not served here; allowed: {allowed:.400}",
        param="model",
        code="model_not_found",
    )


def check_aliases(models: Mapping[str, ModelAlias], served_name: str, contract: PromptContract) -> None:
    """Refuse names that cannot be told apart or stand for a task that the model does not know, before anything starts.

    Raises:
        ConfigError: names the alias and what is allowed.
    """
    for name, alias in models.items():
        if name == served_name:
            raise ConfigError(f"serving.models.{name}: is the served name itself; allowed: any other name")
        if alias.instruction is not None and not alias.instruction.strip():
            raise ConfigError(f"serving.models.{name}.instruction: blank; allowed: a text, or none stated")
        try:
            contract.instruction_for(JINA_TASKS.get(alias.task or "", (None, alias.task))[1])
        except DataError as error:
            raise ConfigError(f"serving.models.{name}.task: {error}") from error
