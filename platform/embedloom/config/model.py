"""Sections about the model: encoder and training."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.instructions import DEFAULT_INSTRUCTIONS, NEMOTRON_TEMPLATE
from embedloom.records import ORIGINS


class EncoderConfig(FrozenConfig):
    """The backbone and its prompt contract."""

    base: str  # a local folder, a Hugging Face id, a .gguf file, or a name of the model registry
    num_layers: int | None = Field(default=None, ge=1)  # keep the first N decoder layers; null: all
    pooling: Literal["mean", "cls", "last_token"] = "mean"
    normalize: bool = True
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    template: str = NEMOTRON_TEMPLATE
    instructions: dict[str, str] = Field(default_factory=lambda: dict(DEFAULT_INSTRUCTIONS))
    add_bos: bool | None = (
        None  # null: BOS for decoders (as the paper), the tokenizer's own habit for encoders
    )
    add_eos: bool | None = None  # null: no EOS for decoders, the tokenizer's own habit for encoders
    padding_side: Literal["left", "right"] = "right"
    max_query_tokens: int = Field(default=512, ge=8)
    max_document_tokens: int = Field(default=512, ge=8)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: bfloat16 where it is fast

    @field_validator("template")
    @classmethod
    def _template_holds_the_text(cls, value: str) -> str:
        if "{text}" not in value:
            raise ValueError("template must contain {text}; {task} is optional")
        return value

    @field_validator("instructions")
    @classmethod
    def _all_task_types(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(value) - set(DEFAULT_INSTRUCTIONS))
        if unknown:
            raise ValueError(f"unknown task type {unknown[0]!r}; allowed: {sorted(DEFAULT_INSTRUCTIONS)}")
        return {**DEFAULT_INSTRUCTIONS, **value}


class TrainingStage(FrozenConfig):
    """One contrastive stage (arXiv 2511.07025 Table 8)."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    negatives: int = Field(ge=1)
    global_batch: int = Field(ge=1)  # queries per optimizer step, over all workers
    learning_rate: float = Field(gt=0)
    max_steps: int | None = Field(default=None, ge=1)  # null: one pass over the mix per epoch
    epochs: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"


class Candidate(FrozenConfig):
    """One full training run; candidates differ in data order and hyper-parameters, and are then merged."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    seed: int
    learning_rate_scale: float = Field(default=1.0, gt=0)
    mix: dict[str, float] | None = None  # replaces training.mix


class TrainingConfig(FrozenConfig):
    """Contrastive training on mined negatives only, on Ray Train and DeepSpeed."""

    candidates: tuple[Candidate, ...] = Field(min_length=1)
    stages: tuple[TrainingStage, ...] = Field(min_length=1)
    mix: dict[str, float] = Field(default_factory=lambda: {"public": 0.5, "synthetic": 0.5})
    loss: Literal["infonce"] = "infonce"
    temperature: float = Field(default=0.02, gt=0)
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


def check_mix(mix: dict[str, float]) -> dict[str, float]:
    """Shares per origin: known names, none negative, a positive sum."""
    unknown = sorted(set(mix) - set(ORIGINS))
    if unknown:
        raise ValueError(f"unknown origin {unknown[0]!r} in mix; allowed: {list(ORIGINS)}")
    if any(share < 0 for share in mix.values()) or sum(mix.values()) <= 0:
        raise ValueError(f"the shares of a mix must be 0 or more and sum to something positive, found {mix}")
    return mix
