"""The promotion gate: what a candidate must show before it may be served."""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig

ALL_TASKS = "*"


class Tolerance(FrozenConfig):
    """One entry of the no-regression list."""

    task: str = Field(
        default=ALL_TASKS, description="Name of a task, or '*' for every task without an entry of its own."
    )
    drop: float = Field(
        default=0.01,
        ge=0,
        description=(
            "Largest allowed loss of the task's main score (0-1); a larger one refuses the candidate. "
            "0.01 is one point of nDCG@10 in percent."
        ),
    )


class GateConfig(FrozenConfig):
    """Rules of ``embedloom gate``; a limit that is null is not checked."""

    candidate: str = Field(
        default="merged",
        description=(
            "Model under test: 'merged', 'base' or the name of a training run. Only inside a run; "
            "`embedloom gate MODEL` names it itself."
        ),
    )
    against: str = Field(
        default="base",
        description="Model that the candidate is compared with: 'base', 'merged' or the name of a training run.",
    )
    require: Literal["better", "not_worse"] = Field(
        default="better",
        description=(
            "What the 95 % confidence interval of the mean difference over all tasks must show. better: "
            "it lies above 0. not_worse: it does not reach further below 0 than no_regression tolerates "
            "for '*'."
        ),
    )
    significance: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description=(
            "Level at which a task's loss counts as real, after Holm's correction for the number of tasks."
        ),
    )
    no_regression: tuple[Tolerance, ...] = Field(
        default=(Tolerance(),),
        description=(
            "Tasks that must not get worse, each with its tolerance; by default no task may lose more "
            "than 0.01."
        ),
    )
    min_borda_gain: float | None = Field(
        default=0.0,
        description=(
            "Borda votes (rank points within evaluation.pool) that the candidate must gain over the "
            "current model. Null: not checked."
        ),
    )
    max_latency_ratio: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Largest allowed latency of the candidate as a multiple of the current model's, median of one "
            "query. Null: not measured."
        ),
    )
    max_latency_milliseconds: float | None = Field(
        default=None,
        gt=0,
        description="Largest allowed median latency of one query, in milliseconds. Null: not measured.",
    )
    max_size_ratio: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Largest allowed size of the candidate's weights as a multiple of the current model's. Null: "
            "not checked."
        ),
    )
    max_size_mib: float | None = Field(
        default=None,
        gt=0,
        description="Largest allowed size of the candidate's weights, in MiB. Null: not checked.",
    )
    resamples: int = Field(
        default=2000,
        ge=200,
        description=(
            "Bootstrap resamples behind the confidence intervals. More make the bounds steadier and cost "
            "time in proportion."
        ),
    )
    seed: int = Field(default=0, description="Seed of the bootstrap, so that a verdict can be repeated.")

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
