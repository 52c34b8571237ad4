"""Ranks and means as mteb's leaderboard computes them (``mteb/benchmarks/_create_table.py``); pure.

A score table has one row a model and one column a task, NaN where a model has no score. Scores stay float64: rounding
them to four decimals makes ties and moves ranks.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

Scores = Mapping[str, Mapping[str, float]]  # model -> task -> main score, 0-1


@dataclass(frozen=True, slots=True)
class Standing:
    """One model's line of a leaderboard."""

    model: str
    votes: float
    rank: int
    mean_task: float | None  # None where a task is missing, as on the leaderboard
    mean_type: float | None
    types: dict[str, float | None]
    tasks: int  # scored

    def as_json(self) -> dict[str, Any]:
        """For ``scores.json`` and ``gate.json``."""
        return {
            "votes": self.votes,
            "rank": self.rank,
            "mean_task": self.mean_task,
            "mean_type": self.mean_type,
            "types": self.types,
            "tasks": self.tasks,
        }


def score_frame(scores: Scores) -> pd.DataFrame:
    """Models x tasks, float64; models without any score are left out, as on the leaderboard."""
    frame = pd.DataFrame.from_dict({model: dict(row) for model, row in scores.items()}, orient="index")
    return frame.astype("float64").dropna(how="all")


def borda_votes(frame: pd.DataFrame, models: int | None = None) -> pd.Series:
    """Votes of each model: within a task ``models - rank``, ties share their average rank; a missing score has none.

    Args:
        frame: models x tasks.
        models: what ranks are subtracted from; None: the frame's.
    """
    ranks = frame.rank(axis=0, method="average", ascending=False)
    return ((len(frame) if models is None else models) - ranks).fillna(0.0).sum(axis=1)


def rank_models(
    scores: Scores,
    types: Mapping[str, str],
    partial: Mapping[str, Collection[str]] | None = None,
    *,
    partial_in_means: bool = False,
) -> list[Standing]:
    """All models by votes, best first, equal ones by name; models with equal votes share the better rank.

    A partial score (some of a task's subsets) takes part in the ranking but not in the means, and a model with
    partial scores only is not counted among the models that votes are subtracted from: so does mteb 2.26.

    Args:
        scores: of the whole pool; votes only compare within one set of models.
        types: task -> task type.
        partial: model -> tasks whose score covers only some subsets.
        partial_in_means: let them into the means too.
    """
    frame = score_frame(scores)
    whole = frame.copy()
    for model, tasks in (partial or {}).items():
        if model in whole.index:
            whole.loc[model, [task for task in tasks if task in whole.columns]] = float("nan")
    votes = borda_votes(frame, int(whole.notna().any(axis=1).sum()))
    ranks = votes.rank(method="min", ascending=False)
    counted = frame if partial_in_means else whole
    mean_task = counted.mean(axis=1, skipna=False)
    by_type = pd.DataFrame(
        {
            kind: counted[[task for task in frame.columns if types[task] == kind]].mean(axis=1, skipna=False)
            for kind in sorted({types[task] for task in frame.columns})
        }
    )
    mean_type = by_type.mean(axis=1, skipna=False)
    found = [
        Standing(
            model=str(model),
            votes=float(votes[model]),
            rank=int(ranks[model]),
            mean_task=_number(mean_task[model]),
            mean_type=_number(mean_type[model]),
            types={kind: _number(by_type.loc[model, kind]) for kind in by_type.columns},
            tasks=int(frame.loc[model].notna().sum()),
        )
        for model in frame.index
    ]
    return sorted(found, key=lambda standing: (standing.rank, standing.model))


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
