"""Where a model comes from: the base it was trained from, and what identifies its files."""

from typing import Any

import yaml

from embedloom.artefacts import MANIFEST_FILE, Artefact, fingerprint
from embedloom.errors import DataError, one_line
from embedloom.model_folder import ModelFolder
from embedloom.storage import Place

CARD_FILE = "README.md"
_DEPTH = 8  # training stages that may follow each other


def stated_base(place: Place, *, itself: bool = False) -> tuple[str, str] | None:
    """What a model folder says it was trained from: ("artefact", fingerprint) or ("base_model", name), or None.

    An artefact of training names its start in its manifest, and so on back to the untrained base; any other folder
    may name a base in the header of its model card.

    Args:
        place: a model folder.
        itself: it is the base, so an artefact stands for itself.
    """
    if place.exists(MANIFEST_FILE):
        manifest = place.read_json(MANIFEST_FILE)
        if itself:
            return "artefact", str(manifest.get("fingerprint"))
        return _from_manifest(place, manifest)
    named = card_header(place).get("base_model")
    if itself or not isinstance(named, str):
        return None
    return "base_model", named


def _from_manifest(place: Place, manifest: dict[str, Any]) -> tuple[str, str] | None:
    root = Place(place.uri.rstrip("/").rsplit("/", 3)[0])  # <run>/training/<candidate>/<stage>
    for _ in range(_DEPTH):
        inputs = manifest.get("inputs", {})
        if "encoder" in inputs:
            return "artefact", str(inputs["encoder"])
        before = next((name for name in inputs if name.startswith("training/")), None)
        if before is None or not root.exists(f"{before}/{MANIFEST_FILE}"):
            return None
        earlier = root.read_json(f"{before}/{MANIFEST_FILE}")
        if earlier.get("fingerprint") != inputs[before]:
            return None  # rebuilt since; what it was then is not known any more
        manifest = earlier
    return None


def card_header(place: Place) -> dict[str, Any]:
    """The YAML header of the model card; empty if there is none.

    Raises:
        DataError: a header that is not YAML.
    """
    if not place.exists(CARD_FILE):
        return {}
    parts = place.read_bytes(CARD_FILE).decode(errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise DataError(f"{place.uri}/{CARD_FILE}: its header is not YAML: {one_line(error)}") from error
    return header if isinstance(header, dict) else {}


def model_state(place: Place) -> str:
    """Fingerprint of a model folder: an artefact's own, else of what its files hold; in an object store, of their sizes
    and tags."""
    if place.exists(MANIFEST_FILE):
        return Artefact.open(place).fingerprint
    if place.is_local:
        return fingerprint(ModelFolder(place.local).contents)
    return fingerprint({name: place.state(name) for name in place.files()})
