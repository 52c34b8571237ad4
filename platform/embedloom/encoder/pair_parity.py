"""Whether a saved reranker gives the trained scores in the programs that read it: measured on golden pairs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from embedloom.core.progress import note
from embedloom.encoder.model import Vectors
from embedloom.encoder.pairs import PairEncoder
from embedloom.errors import StageError

# The trainer scores a few fixed pairs with the weights it holds. After export, our own encoder, transformers and
# sentence-transformers read the folder and score them in float32; a reader that is off would serve another model. What
# bfloat16 does to the trainer's logits is allowed for, and said.


GOLDEN_FILE = "_golden.json"
GOLDEN_PAIRS: tuple[tuple[str, str], ...] = (
    ("How do I merge two sorted lists?", "Merge them by comparing their first elements again and again."),
    ("How do I merge two sorted lists?", "Paris is the capital of France. " * 40),
    ("größer, 日本語, émigré, Ω", "larger, Japanese, emigrant, ohm"),
    ("a " * 400, "a"),
    ("capital of France", ""),
)
# Largest difference of logits, relative to the largest (at least 1), by the coarser of the two compute types.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


def golden_logits(encoder: PairEncoder) -> list[float]:
    """Logits of the golden pairs in the encoder's dtype; under ZeRO-3, all workers must call it together."""
    queries, documents = zip(*GOLDEN_PAIRS, strict=True)
    ids, _ = encoder.tokenize_pairs(queries, documents)
    training = encoder.model.training
    encoder.model.eval()
    with torch.no_grad():
        # One by one: what a pair's neighbours do to it is another question.
        logits = torch.cat([encoder.forward([own]) for own in ids])[:, 0].float().cpu().tolist()
    encoder.model.train(training)
    return [float(logit) for logit in logits]


def save_golden_logits(logits: Sequence[float], dtype: torch.dtype, folder: Path) -> None:
    """Write what the trainer computes in ``dtype`` beside the weights."""
    content = {"dtype": str(dtype).removeprefix("torch."), "logits": list(logits)}
    (folder / GOLDEN_FILE).write_text(json.dumps(content) + "\n")


def check_reranker_export(folder: Path) -> dict[str, float]:
    """Largest difference of golden logits between the trainer and our reader, and between that and each other reader.

    Args:
        folder: a reranker with golden logits.

    Returns:
        By reader; relative to the largest logit, at least 1. ``trainer (bfloat16)``, or whatever it computes in, is what
        its arithmetic does to the logits of its weights.

    Raises:
        StageError: above ``TOLERANCE``.
    """
    content = json.loads((folder / GOLDEN_FILE).read_text())
    own = _own(folder)
    found = {f"trainer ({content['dtype']})": _difference(np.asarray(content["logits"]), own)}
    for name, read in _READERS.items():
        found[name] = _difference(read(folder), own)
    for name, difference in found.items():
        limit = TOLERANCE["bfloat16" if name.endswith("(bfloat16)") else "float32"]
        if not difference <= limit:
            raise StageError(
                f"{folder}: {name} has other logits of the golden pairs than embedloom reads: they differ by {difference:.2g} "
                f"of the largest; allowed: {limit:g}"
            )
    note("parity", ", ".join(f"{name} {difference:.1e}" for name, difference in found.items()))
    return {name: round(difference, 8) for name, difference in found.items()}


def _difference(one: Vectors, other: Vectors) -> float:
    return float(np.abs(one - other).max() / max(1.0, float(np.abs(other).max())))


def _own(folder: Path) -> Vectors:
    queries, documents = zip(*GOLDEN_PAIRS, strict=True)
    return PairEncoder.open(folder, dtype="float32", device="cpu").score(queries, documents)


def _transformers(folder: Path) -> Vectors:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    logits = []
    for query, document in GOLDEN_PAIRS:
        batch = tokenizer([[query, document]], truncation="longest_first", return_tensors="pt")
        with torch.no_grad():
            logits.append(float(model(**batch).logits[0, 0]))
    return np.asarray(logits, dtype=np.float32)


def _sentence_transformers(folder: Path) -> Vectors:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    pairs = [list(pair) for pair in GOLDEN_PAIRS]
    found = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)


_READERS: dict[str, Callable[[Path], Vectors]] = {
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
}
