"""The promotion gate: what a candidate must show before it may be served."""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig

ALL_TASKS = "*"


class Tolerance(FrozenConfig):
    """One entry of the no-regression list."""

    task: str = ALL_TASKS  # a task's name, or "*" for every task without an entry of its own
    drop: float = Field(default=0.01, ge=0)  # of the main score, 0-1; a larger drop refuses the candidate


class GateConfig(FrozenConfig):
    """Rules of ``embedloom gate``; a limit that is null is not checked."""

    candidate: str = "merged"  # in a run: "merged", "base" or a candidate's name
    against: str = "base"
    require: Literal["better", "not_worse"] = "better"  # of the mean over tasks, by its confidence interval
    significance: float = Field(default=0.05, gt=0, lt=0.5)  # of a task's loss, after Holm's correction
    no_regression: tuple[Tolerance, ...] = (Tolerance(),)
    min_borda_gain: float | None = 0.0  # votes over the current model, within the pool
    max_latency_ratio: float | None = Field(default=None, gt=0)  # candidate / current, median of one query
    max_latency_milliseconds: float | None = Field(default=None, gt=0)
    max_size_ratio: float | None = Field(default=None, gt=0)  # bytes of weights, candidate / current
    max_size_mib: float | None = Field(default=None, gt=0)
    resamples: int = Field(default=2000, ge=200)
    seed: int = 0

    @model_validator(mode="after")
    def _one_entry_a_task(self) -> "GateConfig":
        names = [entry.task for entry in self.no_regression]
        if len(set(names)) != len(names):
            raise ValueError(f"no_regression names a task twice: {names}")
        if self.candidate == self.against:
            raise ValueError(f"candidate and against are both {self.candidate!r}; a model cannot beat itself")
        return self

    def tolerance(self, task: str) -> float | None:
        """The largest allowed drop of a task's main score; None where the list does not name it."""
        drops = {entry.task: entry.drop for entry in self.no_regression}
        return drops.get(task, drops.get(ALL_TASKS))

    @property
    def measures_latency(self) -> bool:
        """Whether a limit needs the models to be timed."""
        return self.max_latency_ratio is not None or self.max_latency_milliseconds is not None
