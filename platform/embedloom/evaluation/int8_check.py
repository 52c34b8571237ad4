"""What 8-bit linear layers cost a model on its run's held-out queries; ``int8.json`` beside the weights keeps it."""

import json
from pathlib import Path
from typing import Any

from embedloom.artefacts import Artefact
from embedloom.encoder.device import DTypeName
from embedloom.encoder.model import Encoder
from embedloom.evaluation.scoring import run_mteb
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.tasks import build_task, task_size
from embedloom.evaluation.wrapper import EncoderModel
from embedloom.model_folder import ModelFolder
from embedloom.verdict import int8_verdict


def measure_int8(folder: Path, corpus: Artefact, threads: int, split: str = "test") -> dict[str, Any]:
    """Rank the held-out queries' documents with float32 and with int8 layers, queries and documents alike.

    Texts get the instructions that the endpoint sends by default.

    Args:
        folder: the model.
        corpus: of the run that made it.
        threads: to compute with.
        split: of the held-out queries.

    Returns:
        The content of ``int8.json``, not written yet.

    Raises:
        DataError: the corpus has no such queries.
        ConfigError: this CPU has no kernel for int8.
    """
    spec = TaskSpec("heldout", split=split)
    task = build_task(spec, corpus)
    scores = {}
    types: tuple[DTypeName, ...] = (
        "int8",
        "float32",
    )  # int8 first: where it is not to be had, that is known at once
    for dtype in types:
        model = EncoderModel(Encoder.load(folder, threads=threads, dtype=dtype), f"embedloom/{dtype}", "1")
        model.instructed = spec.instructed
        scores[dtype] = _ndcg(run_mteb(model, task)[f"{task.metadata.name}.json"], split)
    return int8_verdict(
        ModelFolder(folder).weights, scores["float32"], scores["int8"], task_size(task)["queries"]
    )


def _ndcg(result: bytes, split: str) -> float:
    """nDCG@10 out of mteb's result file of one task without subsets."""
    (entry,) = json.loads(result)["scores"][split]
    return float(entry["ndcg_at_10"])
