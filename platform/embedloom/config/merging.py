"""The merging section: how several models become one, and how their weights are searched."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.use import EvaluationTask

MergeMethod = Literal[
    "linear", "slerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock"
]  # fmt: skip
# Methods on task vectors, the models' differences from the model they were all trained from.
FROM_BASE: tuple[MergeMethod, ...] = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock")
# Task vectors are added up as they are weighted, so weights need no common sum, and a negative one forgets.
SIGNED: tuple[MergeMethod, ...] = ("task_arithmetic", "dare_linear")
# Fewest and most models; one model alone is copied (linear) or scaled about the base.
MODEL_COUNTS: dict[MergeMethod, tuple[int, int | None]] = {
    "slerp": (2, 2), "multislerp": (2, None), "karcher": (2, None), "model_stock": (2, None),
}  # fmt: skip
_OWN_KEYS: dict[str, tuple[MergeMethod, ...]] = {
    "density": ("ties", "dare_linear", "dare_ties"),
    "scale": ("task_arithmetic", "ties", "dare_linear", "dare_ties"),
    "seed": ("dare_linear", "dare_ties"),
}


class LayerWeights(FrozenConfig):
    """Other weights for some tensors: those of a range of layers, or those whose names match a pattern."""

    layers: tuple[int, int] | None = None  # first and last layer, counted from 0, both included
    tensors: str | None = Field(default=None, min_length=1)  # a shell pattern, such as "*.self_attn.*"
    weights: tuple[float, ...]

    @model_validator(mode="after")
    def _one_of_both(self) -> "LayerWeights":
        if (self.layers is None) == (self.tensors is None):
            raise ValueError(
                "a rule of merging.layers names either layers: [first, last] or tensors: PATTERN"
            )
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers is {list(self.layers)}; expected [first, last] with 0 <= first <= last")
        return self


class MergeSearch(FrozenConfig):
    """Weights found by scoring merges on dev tasks, checked on queries the search never saw."""

    kind: Literal["greedy_soup", "weights"] = "greedy_soup"
    tasks: tuple[EvaluationTask, ...] = (EvaluationTask(name="dev", split="dev"),)
    # Tasks of the check; empty: of each dev task, the half of the queries whose hash is odd.
    check_tasks: tuple[EvaluationTask, ...] = ()
    step: float = Field(
        default=0.5, gt=0, lt=1
    )  # weights: first change of one model's weight, halved each round
    rounds: int = Field(default=3, ge=1)  # weights: passes over the models
    max_merges: int = Field(default=40, ge=3)  # scored merges altogether, leave-one-out included
    leave_one_out: bool = True  # also score the chosen merge without each of its models

    @field_validator("tasks")
    @classmethod
    def _some_task(cls, value: tuple[EvaluationTask, ...]) -> tuple[EvaluationTask, ...]:
        if not value:
            raise ValueError("tasks must name at least one dev task")
        return value

    @model_validator(mode="after")
    def _names_are_unique(self) -> "MergeSearch":
        names = [task.name for task in (*self.tasks, *self.check_tasks)]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks and check_tasks must have different names, found {names}")
        return self


class MergingConfig(FrozenConfig):
    """How the candidates become one model; the paper averages six with equal weights (§3.3)."""

    method: MergeMethod = "linear"
    weights: tuple[float, ...] | None = None  # one per model; null: equal
    layers: tuple[LayerWeights, ...] = ()  # the first rule that matches a tensor decides its weights
    density: float = Field(
        default=0.5, gt=0, le=1
    )  # ties: largest share kept; dare: probability of being kept
    scale: float = 1.0  # factor of the combined task vector (mergekit's lambda)
    seed: int = 0  # dare
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the written tensors; sums are float32
    file_mib: int = Field(default=1024, ge=1)  # most bytes of one weight file; files are written in parallel
    search: MergeSearch | None = None
    # Differences between models that a person knows to change nothing, as the refusal names them ("config.json:vocab_size",
    # a whole file, "base" for stated origins); the first model's counts, and the lineage lists them.
    allow: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)

    @property
    def needs_base(self) -> bool:
        """Whether the method reads the model that all others were trained from."""
        return self.method in FROM_BASE

    @model_validator(mode="after")
    def _keys_fit_method(self) -> "MergingConfig":
        for key, methods in _OWN_KEYS.items():
            if key in self.model_fields_set and self.method not in methods:
                raise ValueError(
                    f"method {self.method} does not read {key}, which is a key of {', '.join(methods)}"
                )
        if self.method == "model_stock" and (
            self.weights is not None or self.layers or self.search is not None
        ):
            raise ValueError(
                "method model_stock takes no weights, layers or search: it counts all models alike"
            )
        return self

    @model_validator(mode="after")
    def _search_fits(self) -> "MergingConfig":
        if self.search is None:
            return self
        if self.weights is not None or self.layers:
            raise ValueError("search finds the weights; leave weights and layers out")
        if self.search.kind == "greedy_soup" and self.method != "linear":
            raise ValueError(f"search greedy_soup averages, found method {self.method}; allowed: linear")
        if self.method == "slerp":
            raise ValueError("search scores models alone and left out, but slerp takes exactly two")
        return self
