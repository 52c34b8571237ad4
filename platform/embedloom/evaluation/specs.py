"""From the tasks of the config to single tasks: a folder or a benchmark becomes the tasks it holds."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mteb

from embedloom.config.evaluation import EvaluationTask
from embedloom.core.storage import located
from embedloom.errors import ConfigError
from embedloom.evaluation.local_layout import LocalTask, find_local_tasks


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task to score on; small and picklable, so that actors build the task themselves."""

    name: str
    kind: Literal["heldout", "beir", "local", "mteb"] = "heldout"
    split: str = "test"
    path: str | None = None
    local: LocalTask | None = None
    limit: int | None = None
    languages: tuple[str, ...] | None = None
    benchmark: str | None = None  # whose choice of subsets and splits applies
    ignore_identical_ids: bool | None = None  # None: by the data, see make_retrieval_task
    prompts: Literal["default", "own", "published"] | None = None  # as the config states them

    @property
    def instructed(self) -> bool:
        """Whether texts get the instructions that come with the task, not what the endpoint sends by default."""
        return self.prompts_of != "default"

    @property
    def prompts_of(self) -> str:
        """``default``, ``own`` or ``published``, stated or not."""
        return self.prompts or ("published" if self.kind == "mteb" else "default")

    @property
    def where(self) -> str:
        """How errors name the task."""
        return f"evaluation.tasks: {self.name!r}"


def expand_tasks(tasks: Sequence[EvaluationTask]) -> list[TaskSpec]:
    """Single tasks in the order of the config.

    Raises:
        ConfigError: an unknown benchmark, or two tasks of one name, whose results would overwrite each other.
        DataError: a local path that holds no task, or half of one.
    """
    specs = [spec for task in tasks for spec in _expand(task)]
    twice = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if twice:
        raise ConfigError(f"evaluation.tasks: {twice[0]!r} is named by two entries; name it once")
    return specs


def _expand(task: EvaluationTask) -> list[TaskSpec]:
    if task.kind == "benchmark":
        return [
            TaskSpec(
                member.metadata.name,
                "mteb",
                languages=task.languages,
                benchmark=task.name,
                prompts=task.prompts,
            )
            for member in _benchmark(task.name).tasks
        ]
    if task.kind != "local":
        return [
            TaskSpec(task.name, task.kind, task.split, task.path, None, task.limit, task.languages,
                     ignore_identical_ids=task.ignore_identical_ids, prompts=task.prompts)
        ]  # fmt: skip
    found = find_local_tasks(located(str(task.path)), f"evaluation.tasks: {task.name!r}")
    single = len({local.path for local in found}) == 1
    return [
        TaskSpec(local.named(task.name) if single else local.name, "local", task.split, local.path, local,
                 task.limit, task.languages, ignore_identical_ids=task.ignore_identical_ids,
                 prompts=task.prompts)
        for local in found
    ]  # fmt: skip


def _benchmark(name: str) -> mteb.Benchmark:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on newer versions; the user named this one
        try:
            return mteb.get_benchmark(name)
        except KeyError as error:
            hint = str(error.args[0]).splitlines()[0][:200]
            raise ConfigError(f"evaluation.tasks: no mteb benchmark is named {name!r} ({hint})") from error
