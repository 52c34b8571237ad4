"""A grid of runs that differ in a few keys: ``jobs/configs/ablation_*.yaml``."""

import json
import re
from itertools import product
from typing import Any

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.]+")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Variant(FrozenConfig):
    """One way to set the keys."""

    name: str = Field(
        pattern=NAME_PATTERN, description="Name of the variant in the table and of its runs' folders."
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="Key of the run config (training.stages.0.negatives) -> value."
    )


class AblationConfig(FrozenConfig):
    """Variants of one run config, each trained with several seeds and compared on one score.

    Keys are paths as ``--set`` has them (``training.stages.0.negatives``).
    """

    name: str = Field(
        pattern=NAME_PATTERN, description="Name of the ablation: its runs lie below OUTPUT_DIR/NAME."
    )
    description: str = Field(default="", description="Free text for people; shown above the table.")
    base: str = Field(description="Run config that all variants start from, relative to this file's folder.")
    profile: str = Field(
        default="local", description="Profile of the cluster config, where the command names none."
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="Key of the run config -> value, for all variants."
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description=(
            "Key of the run config -> list of values; every combination is a variant. In place of variants."
        ),
    )
    variants: tuple[Variant, ...] = Field(
        default=(), description="The variants one by one. In place of a grid."
    )
    seeds: tuple[int, ...] = Field(
        default=(1, 2, 3),
        min_length=1,
        description=(
            "Seeds of the training runs: every variant is trained with each. Three is the fewest that "
            "give an interval."
        ),
    )
    model: str = Field(
        default="merged",
        description="Which model is compared: 'merged', 'base' or the name of a training run.",
    )
    task: str | None = Field(
        default=None, description="Evaluation task whose score is compared. Null: the mean over all tasks."
    )
    metric: str = Field(
        default="main_score",
        description="Score of the task: main_score, or one it reports, such as ndcg_at_10.",
    )

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"seeds must be different, found {list(value)}")
        return value

    @field_validator("grid")
    @classmethod
    def _values_differ(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in value.items():
            if len({json.dumps(one, sort_keys=True) for one in values}) != len(values) or not values:
                raise ValueError(f"{key} needs one or more different values, found {values}")
        return value

    @model_validator(mode="after")
    def _variants_are_told_one_way(self) -> "AblationConfig":
        if bool(self.grid) == bool(self.variants):
            raise ValueError("an ablation has either a grid or variants")
        names = [variant.name for variant in self.all_variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants must have different names, found {names}")
        return self

    @property
    def all_variants(self) -> tuple[Variant, ...]:
        """The variants, those of a grid in the order of its keys and values, the last key fastest."""
        if self.variants:
            return self.variants
        choices = [[(key, at, value) for at, value in enumerate(values)] for key, values in self.grid.items()]
        return tuple(
            Variant(
                name="_".join(_part(key, at, value) for key, at, value in chosen),
                set={key: value for key, _, value in chosen},
            )
            for chosen in product(*choices)
        )


def _part(key: str, position: int, value: Any) -> str:
    """One key's part of a variant's name: ``loss-gecko``; by number where the value is a list or mapping."""
    last = _NOT_IN_A_NAME.sub("-", key.rsplit(".", 1)[-1])
    shown = str(position + 1) if isinstance(value, list | dict) else _NOT_IN_A_NAME.sub("-", str(value))
    return f"{last}-{shown.strip('-')}"
