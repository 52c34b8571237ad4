"""Learning rate as a function of the step."""

import math

from embedloom.config.training import TrainingStage


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str) -> float:
    """Learning rate of optimizer step ``step`` (0-based).

    Linear warm-up over ``warmup_steps``, then ``linear`` or ``cosine`` decay to 0 at ``total_steps``, or
    ``constant`` (arXiv 2511.07025 Table 8: linear, 100 warm-up steps).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_warnings(stage: TrainingStage, steps: int, epoch_size: int) -> list[str]:
    """What a stage's numbers lead to that nobody wants: a peak that is never reached, batches that repeat rows.

    Args:
        stage: its settings.
        steps: optimizer steps that it takes.
        epoch_size: different rows that an epoch has.
    """
    found = []
    if stage.warmup_steps > steps:
        found.append(
            f"warmup_steps is {stage.warmup_steps}, but the stage has {steps} steps, so it ends at "
            f"{steps / stage.warmup_steps:.0%} of learning_rate {stage.learning_rate:g}; give fewer, or more steps"
        )
    if stage.global_batch > epoch_size:
        found.append(
            f"global_batch is {stage.global_batch}, but an epoch has {epoch_size} different rows, so a batch holds rows "
            f"up to {math.ceil(stage.global_batch / epoch_size)} times; no loss compares them with each other"
        )
    return found
