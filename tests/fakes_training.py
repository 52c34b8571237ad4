"""Small training configs, and dev tasks that need no evaluation."""

from dataclasses import dataclass
from typing import Any

from embedloom.compute.shards import run_here
from embedloom.config.training import TrainingConfig, TrainingSource
from embedloom.core.storage import Place
from embedloom.training.data import ROWS_FOLDER, RowRules, SourceWork, TextTokens, prepare_works


def training_config(**changes: Any) -> TrainingConfig:
    """One candidate, one stage."""
    stage = {"name": "s", "negatives": 1, "global_batch": 2, "learning_rate": 1e-3}
    settings: dict[str, Any] = {"candidates": [{"name": "a", "seed": 0}], "stages": [stage]}
    return TrainingConfig.model_validate({**settings, **changes})


def prepare_source(source: TrainingSource, tokens: TextTokens, rules: RowRules, out: Place) -> dict[str, Any]:
    """Write one source's token ids below ``out`` in this process; its index."""
    own = (rules.negatives, rules.repeat, rules.skip_bad)
    work = SourceWork(source, None, out.child(ROWS_FOLDER), tokens.model, tokens.identity, own, out)
    (index,) = prepare_works("prepare", [work], run_here)
    work.rows.remove()
    return index


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
