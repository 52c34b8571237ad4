"""``gate.json`` and ``int8.json``: what was judged of a model's weights, in the form in which it is kept.

The gate's verdict lies beside the weights where embedloom made them. A foreign model's goes beside the results of the
gate, and whoever serves the model says where: its folder may be an installed package or another program's cache. Both
files name the fingerprint of the weights (``ModelFolder.weights``), so a verdict that was copied to another model, or a
model whose weights were replaced after it passed, counts as none.
"""

import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from embedloom.errors import DataError

GATE_FILE = "gate.json"
VERDICTS_FOLDER = "verdicts"  # of foreign models, below the gate's results
INT8_FILE = "int8.json"  # the same of serving with 8-bit linear layers
INT8_MOST_LOST = 0.005  # nDCG@10
PASSED, REFUSED = "passed", "refused"


class Verdict(TypedDict):
    """``gate.json``: whether a model may replace another, and what that rests on; files of others may have less."""

    verdict: str  # passed, refused
    reasons: list[str]
    weights: str  # fingerprint of the judged ones
    checks: list[dict[str, Any]]  # name, passed, text
    tasks: dict[str, dict[str, Any]]  # candidate, current, difference, low, high, p_worse, p_better, result
    mean: dict[str, float]  # difference, low, high
    prompts: dict[str, str]  # task -> whose: default, own, published
    candidate: str
    against: str
    against_weights: str
    rules: dict[str, Any]
    created: str
    version: str
    size_bytes: NotRequired[list[int]]
    parameters: NotRequired[list[int]]
    latency_milliseconds: NotRequired[list[float]]
    standings: NotRequired[list[dict[str, Any]]]
    pool: NotRequired[str]
    trust_remote_code: NotRequired[list[str]]  # names of models whose code was run


class Int8Verdict(TypedDict):
    """``int8.json``: nDCG@10 on held-out queries with float32 and with 8-bit linear layers."""

    verdict: str  # passed, refused
    ndcg_at_10: dict[str, float]  # float32, int8
    lost: float
    allowed: float
    queries: int
    weights: str  # fingerprint


def read_verdict(path: Path) -> Verdict:
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
    return cast(Verdict, dict(content))


def int8_verdict(weights: str, float32: float, int8: float, queries: int) -> Int8Verdict:
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


def read_int8_verdict(path: Path) -> Int8Verdict:
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
    return cast(Int8Verdict, content)
