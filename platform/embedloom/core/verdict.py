"""``gate.json`` and ``int8.json``: what was judged of a model's weights, in the form in which it is kept.

The gate's verdict lies beside the weights where embedloom made them. A foreign model's goes beside the results of the
gate, and whoever serves the model says where: its folder may be an installed package or another program's cache. Both
files name the fingerprint of the weights (``ModelFolder.weights``), so a verdict that was copied to another model, or a
model whose weights were replaced after it passed, counts as none.
"""

import json
from pathlib import Path
from typing import Any

from embedloom.errors import DataError

GATE_FILE = "gate.json"
VERDICTS_FOLDER = "verdicts"  # of foreign models, below the gate's results
INT8_FILE = "int8.json"  # the same of serving with 8-bit linear layers
INT8_MOST_LOST = 0.005  # nDCG@10
PASSED, REFUSED = "passed", "refused"


def read_verdict(path: Path) -> dict[str, Any]:
    """The gate's verdict that a file holds.

    Raises:
        DataError: it is none.
    """
    try:
        content = json.loads(path.read_text())
        if content["verdict"] not in (PASSED, REFUSED) or not isinstance(content["weights"], str):
            raise ValueError(f"verdict is {content['verdict']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a verdict of the gate ({error}); run `embedloom gate` again") from error
    return dict(content)


def int8_verdict(weights: str, float32: float, int8: float, queries: int) -> dict[str, Any]:
    """The content of ``int8.json``: may these weights be served with 8-bit linear layers?

    Args:
        weights: their fingerprint.
        float32: nDCG@10 on held-out queries with float32 layers.
        int8: the same with int8 layers.
        queries: how many there are.
    """
    lost = round(float32 - int8, 6)
    return {
        "verdict": PASSED if lost <= INT8_MOST_LOST else REFUSED,
        "ndcg_at_10": {"float32": float32, "int8": int8},
        "lost": lost,
        "allowed": INT8_MOST_LOST,
        "queries": queries,
        "weights": weights,
    }


def read_int8_verdict(path: Path) -> dict[str, Any]:
    """What ``int8_verdict`` gave, out of a file.

    Raises:
        DataError: the file is not such a verdict.
    """
    try:
        content = dict(json.loads(path.read_text()))
        if content["verdict"] not in (PASSED, REFUSED):
            raise ValueError(f"verdict is {content['verdict']!r}")
        _ = content["weights"], float(content["lost"]), dict(content["ndcg_at_10"]), int(content["queries"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a verdict on int8 ({error!r}); delete it, and it is measured again"
        ) from error
    return content
