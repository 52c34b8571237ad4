"""Stopping a run that has gone wrong, with the names of the examples that were in the batch."""

import math
from collections import deque
from collections.abc import Sequence

WINDOW_STEPS = 50
DIVERGED_FACTOR = 3.0


class LossWatch:
    """Says whether a loss is not a number, or has diverged.

    Diverged: the mean of the last 50 steps is 3 times the lowest mean of 50 steps so far, and above the mean of the
    first 50. The second condition leaves alone a loss so near 0 that its noise is a multiple of it.
    """

    def __init__(self, window_steps: int = WINDOW_STEPS, factor: float = DIVERGED_FACTOR) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=window_steps)
        self._first: float | None = None
        self._lowest = math.inf

    def problem(self, losses: Sequence[float], ids: Sequence[str], step: int) -> str | None:
        """A sentence if training must stop, else None.

        Args:
            losses: of every query of the global batch.
            ids: of the same queries.
            step: 1-based number of the step they belong to.
        """
        bad = [name for name, loss in zip(ids, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            return f"loss is not finite at step {step} for {len(bad)} of {len(ids)} queries: {', '.join(bad)}"
        mean = self._window_mean(sum(losses) / len(losses))
        if mean is not None and self._has_diverged(mean):
            return (
                f"loss has diverged at step {step}: mean {mean:.4g} over {len(self._recent)} steps, "
                f"lowest so far {self._lowest:.4g}; the batch was {', '.join(ids)}"
            )
        self._remember(mean)
        return None

    def seen(self, loss: float) -> None:
        """A mean loss of a step before the checkpoint a run goes on from."""
        self._remember(self._window_mean(loss))

    def _has_diverged(self, mean: float) -> bool:
        return self._first is not None and mean > self._first and mean > self._factor * self._lowest

    def _window_mean(self, loss: float) -> float | None:
        self._recent.append(loss)
        is_full = len(self._recent) == self._recent.maxlen
        return sum(self._recent) / len(self._recent) if is_full else None

    def _remember(self, mean: float | None) -> None:
        if mean is not None:
            self._first = mean if self._first is None else self._first
            self._lowest = min(self._lowest, mean)
