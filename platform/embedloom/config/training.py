"""Sections about training: stages, candidates, losses."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.training_data import TrainingSource, check_sources
from embedloom.config.training_options import (
    PARITY_READERS,
    DevScoring,
    LoraConfig,
    ParityReader,
    TrackerName,
    check_different,
)
from embedloom.records import ORIGINS

LossName = Literal["infonce", "gecko", "qwen3", "gemini"]
# How a run is watched, checked and restarted decides nothing about the weights, so no fingerprint counts it.
WATCHING = frozenset({"max_failures", "checkpoints_kept", "trackers", "parity"})


class TrainingStage(FrozenConfig):
    """One contrastive stage (arXiv 2511.07025 Table 8)."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    negatives: int = Field(ge=0)  # per query; 0 only for losses that compare with the rest of the batch
    global_batch: int = Field(ge=1)  # queries per optimizer step, over all workers
    learning_rate: float = Field(gt=0)
    max_steps: int | None = Field(default=None, ge=1)  # null: one pass over the mix per epoch
    epochs: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    sources: tuple[TrainingSource, ...] = ()  # none: the run's own mined examples, by training.mix

    @field_validator("sources")
    @classmethod
    def _sources_fit_together(cls, value: tuple[TrainingSource, ...]) -> tuple[TrainingSource, ...]:
        return check_sources(value)

    @property
    def uses_mined(self) -> bool:
        """Whether the run's own mined examples are among what this stage trains on."""
        return not self.sources or any(source.format == "mined" for source in self.sources)


class Candidate(FrozenConfig):
    """One full training run; candidates differ in data order and hyper-parameters, and are then merged."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    seed: int
    learning_rate_scale: float = Field(default=1.0, gt=0)
    mix: dict[str, float] | None = None  # replaces training.mix


class MatryoshkaConfig(FrozenConfig):
    """Prefixes of the vectors that must work alone (arXiv 2205.13147): the loss is summed over all of them."""

    dimensions: tuple[int, ...] = Field(min_length=1)
    weights: tuple[float, ...] | None = None  # one per dimension; null: 1 each

    @model_validator(mode="after")
    def _dimensions_have_weights(self) -> "MatryoshkaConfig":
        if len(set(self.dimensions)) != len(self.dimensions) or min(self.dimensions) < 1:
            raise ValueError(
                f"matryoshka.dimensions must be different and 1 or more, found {list(self.dimensions)}"
            )
        if self.weights is not None:
            if len(self.weights) != len(self.dimensions):
                raise ValueError(
                    f"matryoshka has {len(self.weights)} weights for {len(self.dimensions)} dimensions"
                )
            if min(self.weights) <= 0:
                raise ValueError(f"matryoshka.weights must be above 0, found {list(self.weights)}")
        return self


class TrainingConfig(FrozenConfig):
    """Contrastive training on Ray Train and DeepSpeed."""

    candidates: tuple[Candidate, ...] = Field(min_length=1)
    stages: tuple[TrainingStage, ...] = Field(min_length=1)
    mix: dict[str, float] = Field(default_factory=lambda: {"public": 0.5, "synthetic": 0.5})
    loss: LossName = "infonce"
    qwen3_documents: Literal["all", "positives"] = "all"  # of other queries; two readings of one formula
    temperature: float = Field(default=0.02, gt=0)
    repeat_negatives: bool = (
        True  # a query with too few negatives repeats them in turn; false: it is a bad row
    )
    bad_rows: Literal["fail", "skip"] = (
        "fail"  # an example without query, positive or negatives; skipped ones are counted
    )
    matryoshka: MatryoshkaConfig | None = None
    weight_decay: float = Field(default=0.01, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip_norm: float = Field(default=1.0, gt=0)
    micro_batch_tokens: int = Field(default=4096, ge=64)  # tokens per forward on one worker
    zero_stage: Literal[0, 1, 2, 3] = 2
    gradient_checkpointing: bool = False
    freeze_token_embeddings: bool = (
        False  # in a cut-down model they are most of the weights, and of the traffic
    )
    checkpoint_every_steps: int = Field(default=200, ge=1)
    checkpoints_kept: int = Field(default=2, ge=1)
    max_failures: int = Field(default=3, ge=0)  # worker-group restarts before the stage fails
    dev: DevScoring | None = None
    lora: LoraConfig | None = None
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    parity: tuple[ParityReader, ...] = PARITY_READERS  # readers that must see the exported model as trained

    @field_validator("trackers", "parity")
    @classmethod
    def _named_once(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        return check_different(value, str(info.field_name))

    @field_validator("mix")
    @classmethod
    def _known_origins(cls, value: dict[str, float]) -> dict[str, float]:
        return check_mix(value)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "TrainingConfig":
        for label, names in (
            ("candidates", [candidate.name for candidate in self.candidates]),
            ("stages", [stage.name for stage in self.stages]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{label} must have different names, found {names}")
        for candidate in self.candidates:
            if candidate.mix is not None:
                check_mix(candidate.mix)
        return self

    @model_validator(mode="after")
    def _lora_trains_what_it_says(self) -> "TrainingConfig":
        if self.lora is not None and self.freeze_token_embeddings:
            raise ValueError(
                "freeze_token_embeddings is set beside lora, which freezes all weights of the base; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _loss_has_something_to_push_away(self) -> "TrainingConfig":
        for stage in self.stages:
            if stage.negatives == 0 and self.loss == "infonce":
                raise ValueError(
                    f"stages.{stage.name}.negatives is 0, but infonce knows no other negatives; "
                    "allowed: 1 or more, or loss gecko, qwen3 or gemini"
                )
        return self


def check_mix(mix: dict[str, float]) -> dict[str, float]:
    """Shares per origin: known names, none negative, a positive sum."""
    unknown = sorted(set(mix) - set(ORIGINS))
    if unknown:
        raise ValueError(f"unknown origin {unknown[0]!r} in mix; allowed: {list(ORIGINS)}")
    if any(share < 0 for share in mix.values()) or sum(mix.values()) <= 0:
        raise ValueError(f"the shares of a mix must be 0 or more and sum to something positive, found {mix}")
    return mix
