"""Small training configs, and dev tasks that need no evaluation."""

from dataclasses import dataclass
from typing import Any

from embedloom.config.training import TrainingConfig


def training_config(**changes: Any) -> TrainingConfig:
    """One candidate, one stage."""
    stage = {"name": "s", "negatives": 1, "global_batch": 2, "learning_rate": 1e-3}
    settings: dict[str, Any] = {"candidates": [{"name": "a", "seed": 0}], "stages": [stage]}
    return TrainingConfig.model_validate({**settings, **changes})


@dataclass(frozen=True)
class VectorTasks:
    """One dev task whose score follows from the vectors alone: how like the first text's the second's is."""

    def open(self, encoder: Any) -> "VectorBench":
        return VectorBench(encoder.tokenize(["red 1", "the colour red is number 1", "gold"], "document"))


@dataclass
class VectorBench:
    token_ids: list[list[int]]

    def score(self, vectors: Any) -> dict[str, float]:
        return {"alike": round(float(vectors[0] @ vectors[1]), 4)}
