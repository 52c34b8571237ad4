"""``gate.json``: the gate's verdict beside the weights it is about, and who may be served because of it.

The file names the fingerprint of the weights, so a verdict that was copied to another model, or a model whose weights
were replaced after it passed, counts as none.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from embedloom.errors import DataError
from embedloom.instructions import CONTRACT_FILE

GATE_FILE = "gate.json"
PASSED, REFUSED = "passed", "refused"
_BLOCK_BYTES = 16 * 2**20


def weights_fingerprint(folder: Path) -> str:
    """Sixteen hex digits over all weights, the contract and the model's config, read whole (about 1 s per 1-2 GB).

    Raises:
        DataError: no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise DataError(f"{folder}: no *.safetensors, so this is not a model folder with weights")
    digest = hashlib.blake2b(digest_size=8)
    for path in [folder / "config.json", folder / CONTRACT_FILE, *weights]:
        digest.update(path.name.encode())
        if not path.is_file():
            continue
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def read_verdict(folder: Path) -> dict[str, Any] | None:
    """The verdict stored with a model, or None.

    Raises:
        DataError: the file is not a verdict.
    """
    path = folder / GATE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["verdict"] not in (PASSED, REFUSED) or not isinstance(content["weights"], str):
            raise ValueError(f"verdict is {content['verdict']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a verdict of the gate ({error}); run `embedloom gate` again") from error
    return dict(content)


def check_gated(folder: Path) -> None:
    """Return if these very weights passed the gate.

    Raises:
        DataError: no verdict, one about other weights, or a refusal; the message says how to go on.
    """
    verdict = read_verdict(folder)
    override = "serve it all the same with serving.require_gate: false"
    if verdict is None:
        raise DataError(
            f"{folder}: has not passed the gate (no {GATE_FILE}); run `embedloom gate {folder} --against CURRENT`, or {override}"
        )
    if verdict["verdict"] != PASSED:
        reasons = "; ".join(str(reason) for reason in verdict.get("reasons", ()))
        raise DataError(f"{folder}: the gate refused this model ({reasons}); {override}")
    found = weights_fingerprint(folder)
    if verdict["weights"] != found:
        raise DataError(
            f"{folder}: {GATE_FILE} is about weights {verdict['weights']}, these are {found}; run the gate again, or {override}"
        )
