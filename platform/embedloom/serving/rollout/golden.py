"""Golden vectors against a live replica: does it, as it runs there, give the vectors of the model that was exported?"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import GOLDEN_FILE, GOLDEN_TEXTS, MIN_COSINE, lowest_cosine
from embedloom.errors import ServeError
from embedloom.serving.messages import EncodeJob, EncodeResult, Part, Refusal, Vectors

# MiniLM's golden texts come out at 0.99; whether that is good enough is the gate's question (nDCG, ModelFolder.check_int8), this
# one is only whether it is the same model.
INT8_MIN_COSINE = 0.97
Ask = Callable[[EncodeJob], EncodeResult | Refusal]


def expected_vectors(folder: Path) -> tuple[Vectors, str]:
    """Vectors of the golden texts and the type they were computed in.

    From the trainer, where the folder holds them; else (a foreign model) by our encoder, offline.
    """
    if (folder / GOLDEN_FILE).is_file():
        content = json.loads((folder / GOLDEN_FILE).read_text())
        return np.asarray(content["vectors"], dtype=np.float32), str(content["dtype"])
    encoder = Encoder.load(folder, dtype="float32", device="cpu")
    rows = [encoder.embed([text], side, task)[0] for text, side, task in GOLDEN_TEXTS]
    return np.stack(rows), "float32"


def check_golden(ask: Ask, expected: Vectors, golden_dtype: str, serving_dtype: DTypeName) -> float:
    """Ask for every golden text, one by one; returns the lowest cosine.

    Args:
        ask: one replica's, or any replica's, ``encode``.
        expected: float32 [golden texts, dimension].
        golden_dtype: what they were computed in.
        serving_dtype: what the replica computes in; the coarser type of the two sets the limit.

    Raises:
        ServeError: the replica refuses a text, or gives another vector.
    """
    exact = golden_dtype == serving_dtype == "float32"
    limit = INT8_MIN_COSINE if serving_dtype == "int8" else MIN_COSINE["float32" if exact else "bfloat16"]
    lowest = 1.0
    for (text, side, task), vector in zip(GOLDEN_TEXTS, expected, strict=True):
        # The trainer cut what was too long at its end.
        answer = ask(EncodeJob((Part(side, [text], task_type=task),), truncate="end"))
        if isinstance(answer, Refusal):
            raise ServeError(f"golden vectors: the new version refuses {text[:40]!r}: {answer.message}")
        if answer.vectors.shape != (1, len(vector)):
            raise ServeError(
                f"golden vectors: the new version gives {answer.vectors.shape[1]} dimensions, exported were {len(vector)}"
            )
        cosine = lowest_cosine(answer.vectors, vector[None])
        if not cosine >= limit:
            raise ServeError(
                f"golden vectors: the new version's vector of {text[:40]!r} has cosine {cosine:.5f} to the exported one, "
                f"allowed is {limit} or more"
            )
        lowest = min(lowest, cosine)
    return lowest
