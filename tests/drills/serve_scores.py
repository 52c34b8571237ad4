"""Scores over HTTP beside the evaluation's: every task of a run, or some tasks of any model, asked as the README asks.

    python tests/drills/serve_scores.py runs/quickstart [--model merged] [--tolerance 0.002]
    python tests/drills/serve_scores.py minilm-l6 --task sts/near.parquet [--limit 300]

A query is sent with ``input_type: query`` and nothing else; only tasks that are no search name their type (``task: sts``).
Documents, and queries that the model refuses as too long, are sent with ``truncate: end``, as evaluation cuts them. mteb
scores the vectors; the drill fails where a main score is further than the tolerance from the one in ``scores.json``, or,
without a run, from that of the evaluation's own model in this process.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import mteb
import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from embedloom.config.evaluation import EvaluationConfig, EvaluationTask
from embedloom.core.artefacts import Artefact
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import resolve_model
from embedloom.evaluation.scoring import EncoderModel
from embedloom.evaluation.specs import TaskSpec, expand_tasks
from embedloom.evaluation.tasks import build_task

Post = Callable[[dict[str, Any]], dict[str, Any]]
BATCH = 64
# mteb's names of tasks that are no search, and ours.
TASKS = {"Classification": "classification", "STS": "sts", "PairClassification": "pair_classification",
         "Clustering": "clustering", "BitextMining": "bitext", "MultilabelClassification": "multilabel_classification",
         "Reranking": None, "Retrieval": None}  # fmt: skip


class ServedModel(AbsEncoder):
    """An mteb model that knows nothing but ``POST /v1/embeddings``."""

    def __init__(self, post: Post, name: str) -> None:
        self._post, self._name = post, name
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": "http/served", "revision": "none", "similarity_fn_name": ScoringFunction.COSINE}
        )

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: PromptType | None = None, **_: Any
    ) -> Any:
        texts = [text for batch in inputs for text in batch["text"]]
        body: dict[str, Any] = {"model": self._name, "input_type": "query"}
        if prompt_type == PromptType.document:
            body |= {"input_type": "document", "truncate": "end"}
        if (task := TASKS[task_metadata.type]) is not None:
            body["task"] = task
        vectors = []
        for start in range(0, len(texts), BATCH):
            asked = {**body, "input": texts[start : start + BATCH]}
            try:
                reply = self._post(asked)
            except TooLong:
                reply = self._post({**asked, "truncate": "end"})
            vectors += [entry["embedding"] for entry in reply["data"]]
        return np.asarray(vectors, dtype=np.float32)


def main_score(model: Any, task: Any) -> float:
    """mteb's main score, a mean over splits and subsets."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = mteb.cache.ResultCache(scratch)
        result = mteb.evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False)
    entries = [entry for split in result.task_results[0].scores.values() for entry in split]
    return sum(entry["main_score"] for entry in entries) / len(entries)


class TooLong(Exception):
    """A text above the model's limit."""


def over_http(url: str) -> Post:
    client = httpx.Client(base_url=url, trust_env=False, timeout=120)

    def post(body: dict[str, Any]) -> dict[str, Any]:
        reply = client.post("/v1/embeddings", json=body)
        if reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded":
            raise TooLong
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code}: {reply.text[:300]}")
        content: dict[str, Any] = reply.json()
        return content

    return post


def of_run(run: Path, model: str) -> tuple[Path, list[tuple[TaskSpec, Any, float]]]:
    """The folder of a run's model, and its tasks, loaded, with their scores in the report."""
    resolved = json.loads((run / "run.json").read_text())["resolved"]
    config = EvaluationConfig.model_validate(resolved["evaluation"])
    corpus = Artefact.open(Place(str(run / "corpus")), "corpus")
    recorded = json.loads((run / "evaluation" / "scores.json").read_text())["models"][model]
    last = resolved["training"]["stages"][-1]["name"]
    served = {"merged": run / "merged", "base": run / "encoder"}.get(model, run / "training" / model / last)
    # What was scored by other prompts than the endpoint's, as the run states, is passed over.
    specs = [spec for spec in expand_tasks(config.stated_tasks) if not spec.instructed]
    return served, [(spec, build_task(spec, corpus), recorded[spec.name]) for spec in specs]


def of_model(
    name: str, paths: list[str], limit: int | None
) -> tuple[Path, list[tuple[TaskSpec, Any, float]]]:
    """The folder of a model, and tasks with the scores that the evaluation gives it."""
    folder = resolve_model(name)
    ours = EncoderModel(Encoder.load(folder, dtype="float32"), "embedloom/drill", "1")
    ours.instructed = False
    entries = [EvaluationTask(name=Path(path).stem, kind="local", path=path, limit=limit) for path in paths]
    specs = expand_tasks(entries)
    return folder, [
        (spec, build_task(spec, None), main_score(ours, build_task(spec, None))) for spec in specs
    ]


def drill(
    served: Path, tasks: list[tuple[TaskSpec, Any, float]], tolerance: float, folder: Path
) -> list[dict[str, Any]]:
    """One row a task: over HTTP, in the report, and whether they agree."""
    from serve_process import NAME, endpoint  # the suite takes the client alone

    rows = []
    with endpoint(str(served), folder) as running:
        client = ServedModel(over_http(running.url), NAME)
        for spec, task, recorded in tasks:
            found = main_score(client, task)
            row = {"task": spec.name, "http": round(found, 5), "report": round(recorded, 5)}
            rows.append({**row, "equal": abs(found - recorded) <= tolerance})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a run's folder, or with --task a model")
    parser.add_argument("--task", action="append", default=[], help="a local task file; repeatable")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--model", default="merged")
    parser.add_argument("--tolerance", type=float, default=0.002)
    arguments = parser.parse_args()
    if arguments.task:
        served, tasks = of_model(arguments.source, arguments.task, arguments.limit)
    else:
        served, tasks = of_run(Path(arguments.source), arguments.model)
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        rows = drill(served, tasks, arguments.tolerance, Path(folder))
    for row in rows:
        print(json.dumps(row))
    return 0 if rows and all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
