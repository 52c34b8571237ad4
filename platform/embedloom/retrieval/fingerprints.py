"""Identity of a foreign model folder, wherever it lies."""

from pathlib import Path

from embedloom.contents import digest, model_contents


def folder_fingerprint(folder: Path) -> str:
    """Sixteen hex digits over what the files hold that models are read from, weights included.

    Every byte counts: models tuned in a few layers share their first and last megabytes. Weights are read once, and
    then again when they change (``contents``). A verdict of the gate beside them changes nothing.
    """
    return digest(model_contents(folder))[:16]
