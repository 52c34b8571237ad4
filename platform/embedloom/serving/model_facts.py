"""What a model folder says of itself beside its weights: where it comes from, and what the gate said."""

import json
from pathlib import Path

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.errors import DataError
from embedloom.serving.replies import GateVerdict, Lineage
from embedloom.storage import Place

GATE_FILE = "gate.json"


def read_lineage(folder: Path) -> Lineage | None:
    """The identity of the model artefact in a folder, and of what it was made from; None for a foreign model.

    Raises:
        DataError: a manifest that is none of a model.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return None
    manifest = Artefact.open(Place(str(folder)), "model").manifest
    return Lineage(
        kind=manifest["kind"],
        fingerprint=manifest["fingerprint"],
        inputs={name: str(value) for name, value in manifest["inputs"].items()},
        created=manifest["created"],
    )


def read_gate(folder: Path) -> GateVerdict | None:
    """What the promotion gate wrote into a model folder; None where it did not run.

    Raises:
        DataError: the file states no verdict.
    """
    path = folder / GATE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        return GateVerdict(
            verdict=str(content["verdict"]), reasons=[str(item) for item in content.get("reasons", ())]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: states no verdict of the gate; run the gate again") from error
