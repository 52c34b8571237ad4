"""Sections about training: stages, runs, losses."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.training_data import SourceChanges, TrainingSource, changed_sources, check_sources
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
Schedule = Literal["linear", "cosine", "constant"]
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
    schedule: Schedule = "linear"
    sources: tuple[TrainingSource, ...] = ()  # none: the run's own mined examples, by training.mix

    @field_validator("sources")
    @classmethod
    def _sources_fit_together(cls, value: tuple[TrainingSource, ...]) -> tuple[TrainingSource, ...]:
        return check_sources(value)

    @property
    def uses_mined(self) -> bool:
        """Whether the run's own mined examples are among what this stage trains on."""
        return not self.sources or any(source.format == "mined" for source in self.sources)


class StageChanges(FrozenConfig):
    """What one run has otherwise in a stage; null: as the stage has it."""

    negatives: int | None = Field(default=None, ge=0)
    global_batch: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)  # alone: in place of the stage's max_steps
    warmup_steps: int | None = Field(default=None, ge=0)
    schedule: Schedule | None = None
    sources: dict[str, SourceChanges] = Field(default_factory=dict)  # by name

    def of(self, stage: TrainingStage) -> TrainingStage:
        """The stage with the changes.

        Raises:
            ValueError: a source that the stage does not have, or sources that no longer fit together.
        """
        values = self.model_dump(exclude_none=True, exclude={"sources"})
        if "epochs" in values:
            values.setdefault("max_steps", None)
        values["sources"] = changed_sources(stage.sources, self.sources, stage.name)
        return stage.model_copy(update=values)


class Candidate(FrozenConfig):
    """One training run through all stages, which ends in a candidate; the candidates are then merged.

    What differs between the paper's six runs (arXiv 2511.07025 §6.4): mixes and hyper-parameters.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    seed: int
    learning_rate_scale: float = Field(default=1.0, gt=0)
    mix: dict[str, float] | None = None  # replaces training.mix; the next ones replace the key of their name
    loss: LossName | None = None
    temperature: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    stages: dict[str, StageChanges] = Field(default_factory=dict)  # by name


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

    runs: tuple[Candidate, ...] = Field(min_length=1)  # "candidates" is the older name of the key
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

    @model_validator(mode="before")
    @classmethod
    def _older_name_of_runs(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "candidates" not in value:
            return value
        if "runs" in value:
            raise ValueError("runs and candidates are two names of one list; allowed: runs")
        return {"runs" if key == "candidates" else key: item for key, item in value.items()}

    @field_validator("mix")
    @classmethod
    def _known_origins(cls, value: dict[str, float]) -> dict[str, float]:
        return check_mix(value)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "TrainingConfig":
        for label, names in (
            ("runs", [run.name for run in self.runs]),
            ("stages", [stage.name for stage in self.stages]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{label} must have different names, found {names}")
        return self

    @model_validator(mode="after")
    def _lora_trains_what_it_says(self) -> "TrainingConfig":
        if self.lora is not None and self.freeze_token_embeddings:
            raise ValueError(
                "freeze_token_embeddings is set beside lora, which freezes all weights of the base; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _runs_fit(self) -> "TrainingConfig":
        for run in self.runs:
            config = self.of_run(run)
            check_mix(config.mix)
            for stage in config.stages:
                if stage.negatives == 0 and config.loss == "infonce":
                    raise ValueError(
                        f"stages.{stage.name}.negatives is 0 in run {run.name!r}, but infonce knows no other negatives; "
                        "allowed: 1 or more, or loss gecko, qwen3 or gemini"
                    )
        return self

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The runs, by what they end in."""
        return self.runs

    def of_run(self, run: Candidate) -> "TrainingConfig":
        """The section as one run has it: its changes applied, no other run in it.

        Raises:
            ValueError: a change of a stage or source that is not there.
        """
        names = [stage.name for stage in self.stages]
        if unknown := sorted(set(run.stages) - set(names)):
            raise ValueError(f"run {run.name!r} changes stage {unknown[0]!r}; allowed: {', '.join(names)}")
        changed = {name: getattr(run, name) for name in _RUN_KEYS if getattr(run, name) is not None}
        alone = Candidate(name=run.name, seed=run.seed, learning_rate_scale=run.learning_rate_scale)
        return self.model_copy(
            update={
                **changed,
                "runs": (alone,),
                "stages": tuple(
                    run.stages[stage.name].of(stage) if stage.name in run.stages else stage
                    for stage in self.stages
                ),
            }
        )


_RUN_KEYS = ("mix", "loss", "temperature", "weight_decay")  # of a run, in place of the section's own


def check_mix(mix: dict[str, float]) -> dict[str, float]:
    """Shares per origin: known names, none negative, a positive sum."""
    unknown = sorted(set(mix) - set(ORIGINS))
    if unknown:
        raise ValueError(f"unknown origin {unknown[0]!r} in mix; allowed: {list(ORIGINS)}")
    if any(share < 0 for share in mix.values()) or sum(mix.values()) <= 0:
        raise ValueError(f"the shares of a mix must be 0 or more and sum to something positive, found {mix}")
    return mix
