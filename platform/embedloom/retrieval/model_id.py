"""What tells the weights of one model folder from another's."""

import hashlib
from pathlib import Path

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.storage import Place

_READ_BYTES = 2**20
_ENDINGS = (".json", ".safetensors", ".bin", ".model", ".txt")


def model_id(folder: Path) -> str:
    """A model artefact's fingerprint; of any other folder its name and a hash of its files, ``name@0123456789ab``.

    Of a file larger than two MiB its size and both ends are hashed: weights that were trained further differ in
    nearly every value, and hashing all of them would read a large model twice at every start.
    """
    if (folder / MANIFEST_FILE).is_file():
        return Artefact.open(Place(str(folder)), "model").fingerprint
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in _ENDINGS):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_READ_BYTES))
            stream.seek(max(stream.tell(), size - _READ_BYTES))
            digest.update(stream.read())
    return f"{folder.name}@{digest.hexdigest()[:12]}"
