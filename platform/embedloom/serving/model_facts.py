"""What a model folder says of itself beside its weights: where it comes from, and what the gate said."""

from pathlib import Path

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.serving.replies import GateVerdict, Lineage
from embedloom.storage import Place
from embedloom.verdict import read_verdict


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


def read_gate(folder: Path, stated: str | None = None) -> GateVerdict | None:
    """What the promotion gate said of a model, in its folder or in the stated file; None where it did not run.

    Raises:
        DataError: the file is not a verdict.
    """
    found = read_verdict(folder, stated)
    if found is None:
        return None
    return GateVerdict(verdict=found["verdict"], reasons=[str(reason) for reason in found.get("reasons", ())])
