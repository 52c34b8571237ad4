"""What identifies an embedding job before it runs (weights, input, settings), and the finished vectors it may take over."""

from embedloom.core.artefacts import MANIFEST_FILE, Artefact
from embedloom.core.progress import note
from embedloom.core.storage import Place
from embedloom.errors import ConfigError


def aside_of(place: Place) -> Place:
    """Where a vectors artefact waits while its replacement is built."""
    return Place(f"{place.uri.rstrip('/')}.previous")


def set_aside(place: Place, wanted: str, previous: str | None = None) -> None:
    """Rename a finished artefact of another fingerprint than ``wanted``; an unfinished one is left to the writer.

    In an object store nothing can be renamed: there the vectors are built anew unless ``embedding.previous`` names
    a copy of them.

    Args:
        place: the artefact's folder.
        wanted: fingerprint of the vectors to be built there.
        previous: the config's ``embedding.previous``.

    Raises:
        ConfigError: ``previous`` is this very folder.
    """
    if (
        previous is not None
        and Place(previous).is_local
        and place.is_local
        and Place(previous).local == place.local
    ):
        raise ConfigError(
            f"embedding.previous: {previous} is the folder that is built; leave it out, its vectors are taken over"
        )
    if not place.exists(MANIFEST_FILE) or Artefact.open(place).fingerprint == wanted:
        return
    if not place.is_local:
        note("embed", f"{place.uri} is replaced: in an object store its vectors are not taken over")
        return
    place.move_to(aside_of(place))
