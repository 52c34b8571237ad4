"""Learning rate as a function of the step."""

import math


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
