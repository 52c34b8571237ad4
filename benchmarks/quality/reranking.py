"""What a run's reranker adds to its embedding model, on the tasks that the run was evaluated on.

    python benchmarks/quality/reranking.py RUN [RUN ...] [--json] [--resamples N]

Work: finished runs with a ``reranker`` section, such as ``embedloom run quickstart_reranker``. Of each ranking task: the embedding
model's main score (nDCG@10), the same with its best documents reranked, the mean difference over queries with a 95 %
interval of a paired bootstrap (the items that the evaluation kept), how many queries were helped and hurt, and what the
training took. ``ratio`` is the mean of the reranked scores over that of the others.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from embedloom.config.reranker import MODEL_NODE, RERANKER, SCORES_NODE
from embedloom.core.artefacts import Artefact
from embedloom.core.storage import Place
from embedloom.evaluation.jobs import Scorer, Unit
from embedloom.evaluation.leaderboard import read_strata
from embedloom.evaluation.reranking import FIRST
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.statistics import interval, resampled


def compared(place: Place, task: str, resamples: int) -> dict[str, Any]:
    """One task: both scores, and their difference query by query."""
    strata = {
        name: read_strata(place, Unit(Scorer(name, "models", "", ""), TaskSpec(task)))
        for name in (RERANKER, FIRST)
    }
    with_it, without = (sorted(strata[name], key=lambda one: one.key) for name in (RERANKER, FIRST))
    gains = []
    for one, other in zip(with_it, without, strict=True):
        if one.items != other.items:
            raise SystemExit(f"{place.uri}: {task}, {one.key}: scored on other queries")
        gains.append(one.values - other.values)
    drawn = resampled([with_it, without], resamples, 0)
    low, high = interval(drawn[0] - drawn[1])
    differences = np.concatenate(gains)
    scores = [float(np.mean([one.values.mean() for one in own])) for own in (with_it, without)]
    return {
        "reranked": round(scores[0], 4), "plain": round(scores[1], 4), "difference": round(scores[0] - scores[1], 4),
        "low": round(low, 4), "high": round(high, 4), "queries": len(differences),
        "helped": int((differences > 0).sum()), "hurt": int((differences < 0).sum()),
    }  # fmt: skip


def trained(run: Path) -> dict[str, Any]:
    """What the training of a run's reranker took."""
    artefact = Artefact.open(Place(str(run / MODEL_NODE)))
    counts = artefact.counts
    return {
        **{
            key: counts[key]
            for key in ("steps", "rows", "tokens", "tokens_per_second", "step_seconds", "padding_share")
        },
        "seconds": artefact.manifest["seconds"],
        "peak_memory_mib": artefact.manifest["details"]["peak_memory_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--resamples", type=int, default=10_000)
    options = parser.parse_args()
    rows, training = {}, {}
    print(
        "| run | task | embedding | reranked | difference | 95 % | helped | hurt |\n|---|---|---|---|---|---|---|---|"
    )
    for run in options.runs:
        place = Place(str(run / SCORES_NODE))
        for task in place.read_json("scores.json")["order"]["tasks"]:
            row = compared(place, task, options.resamples)
            rows[f"{run.name}/{task}"] = row
            print(
                f"| {run.name} | {task} ({row['queries']} queries) | {row['plain']:.4f} | {row['reranked']:.4f} | "
                f"{row['difference']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} | {row['helped']} | {row['hurt']} |"
            )
        training[run.name] = trained(run)
        print(f"training of {run.name}: {json.dumps(training[run.name])}")
    if options.json:
        ours, peer = (float(np.mean([row[key] for row in rows.values()])) for key in ("reranked", "plain"))
        result = {
            "name": "reranking",
            "ours": round(ours, 4),
            "peer": round(peer, 4),
            "ratio": round(ours / peer, 4),
        }
        print(
            json.dumps(
                {**result, "unit": "nDCG@10", "equal": None, "work": {"tasks": rows, "training": training}}
            )
        )


if __name__ == "__main__":
    main()
