"""Sections ``evaluation`` and ``gate``: what models are scored on, and what a candidate must show before it may be served."""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig


class EvaluationTask(FrozenConfig):
    """What to score on: the run's own held-out pairs, local task files, an mteb task or a whole mteb benchmark."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,.()_+-]*$",
        description="Name of the task in tables; for kind mteb and benchmark, mteb's own name.",
    )
    kind: Literal["heldout", "beir", "local", "mteb", "benchmark"] = Field(
        default="heldout",
        description=(
            "heldout: the run's own held-out pairs. beir: a BEIR folder. local: a task or a folder of "
            "tasks on disk. mteb: a task of mteb. benchmark: all tasks of an mteb benchmark."
        ),
    )
    path: str | None = Field(
        default=None,
        description=(
            "beir: the folder. local: one task or a folder of tasks (retrieval/NAME/ and reranking/NAME/ "
            "with corpus, queries and qrels, TYPE/NAME.parquet for the other types). Null: the other "
            "kinds have no path."
        ),
    )
    split: Literal["dev", "test"] = Field(
        default="test",
        description="Split that is scored, for heldout, beir and local; mteb's tasks have their own.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Most queries or rows per subset, chosen by hash, for a quicker estimate. Null: all.",
    )
    languages: tuple[str, ...] | None = Field(
        default=None, description="ISO 639-3 codes: only subsets in these languages. Null: all."
    )
    ignore_identical_ids: bool | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "beir, local: whether a document with the query's own id is left out of its ranking. Null: as "
            "BEIR does, unless it is judged relevant to that query. mteb's tasks state it themselves."
        ),
    )
    prompts: Literal["default", "own", "published"] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "Which prompts texts get. default: what the endpoint gives to clients that name at most a "
            "task type. own: each held-out query's own instruction. published: the benchmark's "
            "instruction for the task, with which published scores are made. Null: published for mteb and "
            "benchmark, else default. A gate uses published prompts only where they are stated."
        ),
    )

    @model_validator(mode="after")
    def _prompts_fit_kind(self) -> "EvaluationTask":
        if self.prompts == "own" and self.kind != "heldout":
            raise ValueError(f"prompts is own, kind {self.kind} has none; allowed: default, published")
        if self.prompts == "published" and self.kind in ("heldout", "beir"):
            raise ValueError(f"prompts is published, kind {self.kind} has none; allowed: default")
        return self

    @model_validator(mode="after")
    def _path_fits_kind(self) -> "EvaluationTask":
        needs_path = self.kind in ("beir", "local")
        if needs_path != (self.path is not None):
            raise ValueError(f"kind {self.kind} {'needs' if needs_path else 'takes no'} path")
        if self.ignore_identical_ids is not None and not needs_path:
            raise ValueError(f"kind {self.kind} takes no ignore_identical_ids; allowed: beir, local")
        if self.languages is not None and self.kind in ("heldout", "beir"):
            raise ValueError(f"kind {self.kind} has no language subsets, so it takes no languages")
        return self


class EvaluationConfig(FrozenConfig):
    """What the base, the candidates and the merged model are scored on, and beside which baselines."""

    tasks: tuple[EvaluationTask, ...] = Field(
        default=(EvaluationTask(name="heldout"),),
        description=(
            "What the base, the candidates and the merged model are scored on. Default: the run's "
            "held-out test split."
        ),
    )
    baselines: tuple[Literal["bm25", "teacher", "hybrid"], ...] = Field(
        default=("bm25", "teacher"),
        description=(
            "What they are shown beside: bm25 (word matching), teacher (the first mining teacher), hybrid (what hybrid searches "
            "with the merged model find; no gate compares with it)."
        ),
    )
    shard_texts: int = Field(
        default=4096,
        ge=1,
        description=(
            "Texts that one actor embeds at a time. Batches round differently, so it is part of what "
            "identifies an evaluation."
        ),
    )
    pool: str | None = Field(
        default=None,
        description=(
            "Models to rank the candidates among: a Parquet file of leaderboard scores, or an mteb "
            "results folder. Null: the run's own models."
        ),
    )
    resamples: int = Field(
        default=1000, ge=100, description="Bootstrap resamples behind the confidence intervals."
    )
    prompts: Literal["default", "published"] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "Which prompts mteb tasks and benchmarks get that state none themselves, as tasks[].prompts "
            "has them. Null: published."
        ),
    )

    @property
    def stated_tasks(self) -> tuple[EvaluationTask, ...]:
        """The tasks, each with the prompts that are stated for it."""
        if self.prompts is None:
            return self.tasks
        return tuple(
            task.model_copy(update={"prompts": self.prompts})
            if task.prompts is None and task.kind in ("mteb", "benchmark")
            else task
            for task in self.tasks
        )

    @model_validator(mode="after")
    def _names_are_unique(self) -> "EvaluationConfig":
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must be a non-empty list of different names, found {names}")
        return self


# The promotion gate: what a candidate must show before it may be served.


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
    require_over_baseline: Literal["better", "not_worse"] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "The same of the difference to the strongest of evaluation.baselines: the one with the highest "
            "mean over all tasks. Null: the difference is reported and decides nothing."
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
            "Largest allowed number of the candidate's parameters as a multiple of the current model's, "
            "whatever types their files have. Null: not checked."
        ),
    )
    max_size_mib: float | None = Field(
        default=None,
        gt=0,
        description="Largest allowed size of the candidate's weight files, in MiB. Null: not checked.",
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
