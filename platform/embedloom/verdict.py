"""``gate.json``: the gate's verdict, and who may be served because of it.

It lies beside the weights that it is about where embedloom made them. A foreign model's goes beside the results of the
gate, and whoever serves the model says where: its folder may be an installed package or another program's cache. The file names the fingerprint of the weights, so a verdict that was copied to another model, or a model whose weights
were replaced after it passed, counts as none.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from embedloom.contents import digest, model_contents
from embedloom.errors import DataError
from embedloom.instructions import CONTRACT_FILE

GATE_FILE = "gate.json"
VERDICTS_FOLDER = "verdicts"  # of foreign models, below the gate's results
_OWN_FILES = ("manifest.json", CONTRACT_FILE)
_SHARED_FOLDERS = re.compile(r"site-packages|dist-packages|models--.+")  # of Python, of the Hugging Face hub
INT8_FILE = "int8.json"  # the same of serving with 8-bit linear layers
INT8_MOST_LOST = 0.005  # nDCG@10
PASSED, REFUSED = "passed", "refused"
_DIGITS = 16
_BLOCK_BYTES = 16 * 2**20


def weights_fingerprint(folder: Path) -> str:
    """Sixteen hex digits over all weights, the contract and the model's config, read whole (about 1 s per 1-2 GB).

    Of a foreign model, which has no contract, over every file that it is read from: modules, layers after the pooling,
    prompts and tokenizer too.

    Raises:
        DataError: no weights.
    """
    if not (folder / CONTRACT_FILE).is_file():
        return _foreign_fingerprint(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise DataError(f"{folder}: no *.safetensors, so this is not a model folder with weights")
    found = hashlib.blake2b(digest_size=_DIGITS // 2)
    for path in [folder / "config.json", folder / CONTRACT_FILE, *weights]:
        found.update(path.name.encode())
        if not path.is_file():
            continue
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                found.update(block)
    return found.hexdigest()


def _foreign_fingerprint(folder: Path) -> str:
    contents = model_contents(folder)
    if not any(name.endswith((".safetensors", ".bin")) for name in contents):
        raise DataError(f"{folder}: no *.safetensors or *.bin, so this is not a model folder with weights")
    return digest(contents)[:_DIGITS]


def keeps_verdict(folder: Path) -> bool:
    """Whether a model's verdict lies in its folder: embedloom made it, and it is in nobody else's care."""
    shared = any(_SHARED_FOLDERS.fullmatch(part) for part in folder.resolve().parts)
    return not shared and any((folder / name).is_file() for name in _OWN_FILES)


def read_verdict(folder: Path, stated: str | None = None) -> dict[str, Any] | None:
    """A model's verdict, or None.

    Args:
        folder: of the model.
        stated: the file, where it is not in the folder.

    Raises:
        DataError: the file is not a verdict, or the stated one is missing.
    """
    path = folder / GATE_FILE if stated is None else Path(stated).expanduser()
    if not path.is_file():
        if stated is not None:
            raise DataError(
                f"serving.verdict: {stated!r} does not exist; `embedloom gate` prints where it put it"
            )
        return None
    try:
        content = json.loads(path.read_text())
        if content["verdict"] not in (PASSED, REFUSED) or not isinstance(content["weights"], str):
            raise ValueError(f"verdict is {content['verdict']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a verdict of the gate ({error}); run `embedloom gate` again") from error
    return dict(content)


def check_gated(folder: Path, stated: str | None = None) -> None:
    """Return if these very weights passed the gate.

    Args:
        folder: of the model.
        stated: the verdict's file, where it is not in the folder.

    Raises:
        DataError: no verdict, one about other weights, or a refusal; the message says how to go on.
    """
    verdict = read_verdict(folder, stated)
    override = "serve it all the same with serving.require_gate: false"
    if verdict is None:
        raise DataError(
            f"{folder}: has not passed the gate (no {GATE_FILE}); run `embedloom gate {folder} --against CURRENT`"
            f"{'' if keeps_verdict(folder) else ' and name the verdict that it writes as serving.verdict'}, or {override}"
        )
    if verdict["verdict"] != PASSED:
        reasons = "; ".join(str(reason) for reason in verdict.get("reasons", ()))
        raise DataError(f"{folder}: the gate refused this model ({reasons}); {override}")
    found = weights_fingerprint(folder)
    if verdict["weights"] != found:
        raise DataError(
            f"{folder}: {stated or GATE_FILE} is about weights {verdict['weights']}, these are {found}; run the gate again, or {override}"
        )


def int8_verdict(folder: Path, float32: float, int8: float, queries: int) -> dict[str, Any]:
    """The content of ``int8.json``: may these weights be served with 8-bit linear layers?

    Args:
        folder: the model.
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
        "weights": weights_fingerprint(folder),
    }


def read_int8_verdict(folder: Path) -> dict[str, Any] | None:
    """The stored verdict on these very weights, or None.

    Raises:
        DataError: the file is not such a verdict.
    """
    path = folder / INT8_FILE
    if not path.is_file():
        return None
    try:
        content = dict(json.loads(path.read_text()))
        if content["verdict"] not in (PASSED, REFUSED):
            raise ValueError(f"verdict is {content['verdict']!r}")
        known = (
            content["weights"],
            float(content["lost"]),
            dict(content["ndcg_at_10"]),
            int(content["queries"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a verdict on int8 ({error!r}); delete it, and it is measured again"
        ) from error
    return content if known[0] == weights_fingerprint(folder) else None


def check_int8(folder: Path) -> None:
    """Return if these very weights may be served with 8-bit linear layers.

    Raises:
        DataError: they lose too much, or nobody has measured it; the message says what and how to go on.
    """
    verdict = read_int8_verdict(folder)
    override = (
        "serve it all the same with serving.require_gate: false, or with serving.compute_dtype: float32"
    )
    if verdict is None:
        raise DataError(
            f"{folder}: serving.compute_dtype is 'int8', and no {INT8_FILE} says what these weights lose by it; "
            f"`embedloom serve CONFIG` of their run measures it, or {override}"
        )
    if verdict["verdict"] != PASSED:
        scores = verdict["ndcg_at_10"]
        raise DataError(
            f"{folder}: serving.compute_dtype 'int8' loses {verdict['lost']:.4f} nDCG@10 on {verdict['queries']} held-out "
            f"queries ({scores['float32']:.4f} with float32, {scores['int8']:.4f} with int8), allowed is "
            f"{verdict['allowed']}; {override}"
        )
