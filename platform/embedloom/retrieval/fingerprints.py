"""Identity of a foreign model folder, wherever it lies."""

import hashlib
from pathlib import Path

_READ_BY_MODELS = {".json", ".safetensors", ".bin", ".txt", ".model", ".jinja"}
_EDGE_BYTES = 2**20


def folder_fingerprint(folder: Path) -> str:
    """Sixteen hex digits over the files that models are read from: names, sizes, first and last MiB.

    The edges hold every config whole and a share of the weights, so a fine-tuned copy differs, at the cost of a few
    milliseconds instead of reading gigabytes in every actor.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in _READ_BY_MODELS:
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, size - _EDGE_BYTES))
            digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()[:16]
