"""Small training configs."""

from typing import Any

from embedloom.config.training import TrainingConfig


def training_config(**changes: Any) -> TrainingConfig:
    """One candidate, one stage."""
    stage = {"name": "s", "negatives": 1, "global_batch": 2, "learning_rate": 1e-3}
    settings: dict[str, Any] = {"candidates": [{"name": "a", "seed": 0}], "stages": [stage]}
    return TrainingConfig.model_validate({**settings, **changes})
