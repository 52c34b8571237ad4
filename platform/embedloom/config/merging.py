"""The merging section: how several models become one, and how their weights are searched."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.evaluation import EvaluationTask

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

    layers: tuple[int, int] | None = Field(
        default=None,
        description=(
            "First and last transformer layer that the rule covers, counted from 0, both included. Null: "
            "the rule names tensors instead."
        ),
    )
    tensors: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Shell pattern of tensor names that the rule covers, such as '*.self_attn.*'. Null: the rule "
            "names layers instead."
        ),
    )
    weights: tuple[float, ...] = Field(description="One weight per model, in the order of training.runs.")

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

    kind: Literal["greedy_soup", "weights"] = Field(
        default="greedy_soup",
        description=(
            "greedy_soup: models are added, best first, while the dev score rises (arXiv 2203.05482). "
            "weights: each model's weight is moved up and down and kept where the dev score rises."
        ),
    )
    tasks: tuple[EvaluationTask, ...] = Field(
        default=(EvaluationTask(name="dev", split="dev"),),
        description="Dev tasks that merges are scored on; none may be a task that the run is judged on.",
    )
    check_tasks: tuple[EvaluationTask, ...] = Field(
        default=(),
        description=(
            "Tasks that the found weights are checked on; if they gain nothing there, equal weights stay. "
            "Empty: of each dev task, the half of the queries whose hash is odd."
        ),
    )
    step: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="kind weights: first change of one model's weight; halved each round.",
    )
    rounds: int = Field(default=3, ge=1, description="kind weights: passes over all models.")
    max_merges: int = Field(
        default=40,
        ge=3,
        description=(
            "Most merges that are scored altogether, leave-one-out included; each costs one evaluation of "
            "the dev tasks."
        ),
    )
    leave_one_out: bool = Field(
        default=True,
        description=(
            "Whether the chosen merge is also scored without each of its models, which shows what each "
            "one brings."
        ),
    )

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

    method: MergeMethod = Field(
        default="linear",
        description=(
            "linear (weighted average, the default: arXiv 2511.07025 §3.3 averages six models), slerp, "
            "multislerp, karcher (on the sphere), task_arithmetic, ties, dare_linear, dare_ties (on "
            "differences from the base), or model_stock."
        ),
    )
    weights: tuple[float, ...] | None = Field(
        default=None, description="One weight per model, in the order of training.runs. Null: equal weights."
    )
    layers: tuple[LayerWeights, ...] = Field(
        default=(),
        description="Other weights for some tensors; the first rule that matches a tensor decides its weights.",
    )
    density: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description=(
            "ties: share of each difference's largest values that is kept. dare_linear, dare_ties: "
            "probability that a value is kept."
        ),
    )
    scale: float = Field(
        default=1.0,
        description=(
            "Factor of the combined difference before it is added to the base (mergekit's lambda). Only "
            "for task_arithmetic, ties and dare."
        ),
    )
    seed: int = Field(default=0, description="Seed of the values that dare_linear and dare_ties drop.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Number type of the written tensors; sums are computed in float32 whatever it is.",
    )
    file_mib: int = Field(
        default=1024,
        ge=1,
        description=(
            "Largest weight file, in MiB; a larger model is written as several files, in parallel by the "
            "actors of the profile."
        ),
    )
    search: MergeSearch | None = Field(
        default=None, description="Search for the weights on dev tasks. Null: weights as given."
    )
    allow: tuple[str, ...] = Field(
        default=(),
        exclude_if=lambda value: not value,
        description=(
            "Differences between the models that a person knows to change nothing, as the refusal names "
            "them: 'config.json:vocab_size', a whole file, or 'base' for stated origins. The first "
            "model's value counts, and the lineage lists them."
        ),
    )

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
