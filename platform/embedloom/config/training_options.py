"""Parts of the training section that are off, or small, by default: dev scores, adapters, trackers, parity."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.use import EvaluationTask

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
ParityReader = Literal["embedloom", "transformers", "sentence-transformers", "vllm"]
# Those that need nothing but what training itself needs; vllm starts an engine, half a minute on a CPU.
PARITY_READERS: tuple[ParityReader, ...] = ("embedloom", "transformers", "sentence-transformers")


class DevScoring(FrozenConfig):
    """Scores on development tasks while a stage trains, by the same code that evaluates the finished models."""

    tasks: tuple[EvaluationTask, ...] = Field(
        default=(EvaluationTask(name="dev", split="dev"),),
        description=(
            "Development tasks, written as in evaluation.tasks; each must rank documents and be no task "
            "that the run is judged on."
        ),
    )
    every_steps: int = Field(
        default=200,
        ge=1,
        description=(
            "Optimiser steps between two scorings; the model is also scored before the first step and "
            "after the last."
        ),
    )
    metric: Literal["ndcg_at_10", "mrr_at_10", "recall_at_10", "recall_at_100"] = Field(
        default="ndcg_at_10", description="Score that is watched, mean over the tasks."
    )
    keep: Literal["best", "last"] = Field(
        default="best", description="Which weights the stage hands on: those of the best score, or the last."
    )

    @field_validator("tasks")
    @classmethod
    def _tasks_are_for_development(cls, value: tuple[EvaluationTask, ...]) -> tuple[EvaluationTask, ...]:
        names = [task.name for task in value]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must be a non-empty list of different names, found {names}")
        for task in value:
            if task.kind not in ("mteb", "benchmark") and task.split != "dev":
                raise ValueError(
                    f"task {task.name!r} is of split {task.split}, which is for the final score; allowed: split dev"
                )
        return value

    @property
    def needs_corpus(self) -> bool:
        """Whether a task is the run's own held-out split."""
        return any(task.kind == "heldout" for task in self.tasks)


def check_not_judged(key: str, tasks: tuple[EvaluationTask, ...], judged: tuple[EvaluationTask, ...]) -> None:
    """Refuse a dev task whose very texts the run is judged on: weights chosen by it would be tuned to the test.

    Raises:
        ValueError: naming the task.
    """
    for task in tasks:
        for other in judged:
            if _texts_of(task) == _texts_of(other):
                raise ValueError(
                    f"{key}: {task.name!r} is what evaluation.tasks scores as {other.name!r}; "
                    "choosing weights by it would tune them to the test; allowed: tasks or splits that are not evaluated"
                )


def _texts_of(task: EvaluationTask) -> tuple[str | None, ...]:
    """What decides a task's queries; mteb's tasks are known by name, others by their place."""
    if task.kind in ("mteb", "benchmark"):
        return ("mteb", task.name)
    path = None if task.path is None else task.path.rstrip("/")
    return (task.kind, path, task.split)


class LoraConfig(FrozenConfig):
    """Low-rank adapters instead of all weights (arXiv 2106.09685); the exported model is base + alpha / rank x B A."""

    rank: int = Field(default=16, ge=1, description="Rank of the adapters: their inner dimension.")
    alpha: float = Field(
        default=32.0, gt=0, description="Scale of the adapters: base + alpha / rank x B A is exported."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the adapters' inputs set to 0 while training."
    )
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description=(
            "Last parts of the names of linear layers that get adapters, such as q_proj. Null: every "
            "linear layer."
        ),
    )

    @model_validator(mode="after")
    def _some_target(self) -> "LoraConfig":
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora.target_modules is empty; allowed: names of linear layers, or null for all")
        return self


def check_different(names: tuple[str, ...], label: str) -> tuple[str, ...]:
    """The names, if no two are the same.

    Raises:
        ValueError: two are.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"{label} must be different, found {list(names)}")
    return names
