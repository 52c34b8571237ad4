"""Section ``reranker``: the cross-encoder that orders what the embedding model found, trained on the same examples."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.evaluation import GateConfig
from embedloom.config.training import (
    Candidate,
    DistillationConfig,
    Recomputation,
    Schedule,
    TrackerName,
    TrainingConfig,
    TrainingSource,
    TrainingStage,
    check_different,
    check_mix,
    check_sources,
)

RerankerLoss = Literal["infonce", "bce"]
RERANKER = "reranker"  # name of the one run and of its one stage
# Its artefacts: a base with a fresh head, the trained model, its scores beside those without it, the verdict.
BASE_NODE, MODEL_NODE, SCORES_NODE, GATE_NODE = (
    f"{RERANKER}/{part}" for part in ("base", "model", "evaluation", "gate")
)
# Whose workers build them, by the command that those otherwise work for; the driver builds the others.
WORKERS = {MODEL_NODE: "train", SCORES_NODE: "evaluate"}
_OF_STAGE = (
    "negatives",
    "global_batch",
    "learning_rate",
    "max_steps",
    "epochs",
    "warmup_steps",
    "schedule",
    "sources",
)
_OF_TRAINING = (
    "temperature", "distillation", "weight_decay", "gradient_clip_norm", "micro_batch_tokens", "zero_stage",
    "gradient_checkpointing", "freeze_token_embeddings", "bad_rows", "checkpoint_every_steps", "max_failures", "trackers",
)  # fmt: skip


class RerankerConfig(FrozenConfig):
    """A cross-encoder with one label, trained on mined examples, evaluated, gated and exported."""

    base: str = Field(
        description=(
            "Encoder that is given a head of one label, as encoder.base names one: a folder, a Hugging Face id, or a name "
            "that ships; of a cross-encoder with one label the head is kept. It need not be the encoder's base."
        )
    )
    max_tokens: int = Field(
        default=256,
        ge=16,
        description=(
            "Tokens of a pair, special tokens included; of a longer one the longer text is cut first. What is cut is counted."
        ),
    )
    seed: int = Field(default=0, description="Seed of the head's first weights and of the order of examples.")
    loss: RerankerLoss = Field(
        default="infonce",
        description=(
            "infonce: softmax over a query's positive and its own mined negatives (listwise). bce: binary cross-entropy of "
            "every pair by itself. With distillation and its contrastive_weight 0, the teacher's scores alone decide."
        ),
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Divides the logits in the loss; the exported logits are not divided."
    )
    distillation: DistillationConfig | None = Field(
        default=None,
        description=(
            "Learn from the scores that mining's teacher or mining.rescoring (a larger cross-encoder, or an LLM's yes and "
            "no) gave to a query's own documents, too. Null: off."
        ),
    )
    negatives: int = Field(
        default=7, ge=1, description="Mined negatives per query, at most mining.selection.negatives."
    )
    global_batch: int = Field(
        default=16,
        ge=1,
        description="Queries per optimiser step, over all workers; each has 1 + negatives pairs.",
    )
    learning_rate: float = Field(
        default=5e-5, gt=0, description="Highest learning rate, reached after warm-up."
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps. Null: as many as `epochs` passes need."
    )
    epochs: float = Field(default=1.0, gt=0, description="Passes over the examples, where max_steps is null.")
    warmup_steps: int = Field(
        default=20, ge=0, description="Steps over which the learning rate rises from 0."
    )
    schedule: Schedule = Field(
        default="linear",
        description="After warm-up: linear or cosine decay to 0 at the last step, or constant.",
    )
    mix: dict[str, float] | None = Field(
        default=None,
        description="Origin -> share of the queries, where sources is empty. Null: as training.mix.",
    )
    sources: tuple[TrainingSource, ...] = Field(
        default=(),
        description="What it trains on, as training.stages[].sources. Empty: the run's own mined examples, by mix.",
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay.")
    gradient_clip_norm: float = Field(
        default=1.0, gt=0, description="Largest norm of the gradient; a larger one is scaled down."
    )
    freeze_token_embeddings: bool = Field(
        default=False, description="Do not train the token embeddings: half of a small model's weights."
    )
    micro_batch_tokens: Annotated[int, Field(ge=64)] | Literal["auto"] = Field(
        default=4096,
        description="Tokens per forward pass of one worker, of all its pairs; auto as training.micro_batch_tokens has it.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="What DeepSpeed's ZeRO spreads over the workers, as training.zero_stage."
    )
    gradient_checkpointing: Recomputation = Field(
        default=False, description="Recomputation in the backward pass, as training.gradient_checkpointing."
    )
    bad_rows: Literal["fail", "skip"] = Field(
        default="fail",
        description="What an example without query, positive or negatives does: fail stops and names it, skip counts it.",
    )
    checkpoint_every_steps: int = Field(
        default=200,
        ge=1,
        description="Optimiser steps between checkpoints, from which a killed training continues.",
    )
    max_failures: int = Field(
        default=3, ge=0, description="Restarts of the worker group before the training fails."
    )
    trackers: tuple[TrackerName, ...] = Field(
        default=("tensorboard",), description="Where metrics go beside metrics.jsonl, as training.trackers."
    )
    top: int = Field(
        default=50,
        ge=2,
        le=1000,
        description=(
            "How many of the merged embedding model's best documents are ordered anew: in the evaluation, on those of "
            "evaluation.tasks that rank documents, and of a search that asks for it."
        ),
    )
    require: Literal["better", "not_worse"] = Field(
        default="better",
        description=(
            "What reranking must show against no reranking, query by query, as gate.require has it, or the endpoint refuses "
            "the reranker: the 95 % confidence interval of the mean difference lies above 0, or not below what is tolerated."
        ),
    )

    @field_validator("trackers")
    @classmethod
    def _named_once(cls, value: tuple[TrackerName, ...]) -> tuple[str, ...]:
        return check_different(value, "trackers")

    @field_validator("sources")
    @classmethod
    def _sources_fit_together(cls, value: tuple[TrainingSource, ...]) -> tuple[TrainingSource, ...]:
        return check_sources(value)

    @field_validator("mix")
    @classmethod
    def _known_origins(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return value if value is None else check_mix(value)

    @model_validator(mode="after")
    def _is_a_training(self) -> "RerankerConfig":
        self.training({"public": 1.0})
        return self

    @property
    def stage(self) -> TrainingStage:
        """Its one stage."""
        return TrainingStage(name=RERANKER, **{key: getattr(self, key) for key in _OF_STAGE})

    def training(self, mix: dict[str, float]) -> TrainingConfig:
        """The section as a training of one run and one stage, which loop, order and checkpoints go by.

        Args:
            mix: of the run's own training, where this section states none.

        Raises:
            ValueError: sources or distillation do not fit.
        """
        shared: dict[str, Any] = {key: getattr(self, key) for key in _OF_TRAINING}
        run = Candidate(name=RERANKER, seed=self.seed)
        return TrainingConfig(runs=(run,), stages=(self.stage,), mix=self.mix or mix, **shared)

    @property
    def gate(self) -> GateConfig:
        """Its rule as the gate applies it: reranked against not reranked, in nothing but scores."""
        return GateConfig(candidate=RERANKER, against="merged", require=self.require, min_borda_gain=None)
