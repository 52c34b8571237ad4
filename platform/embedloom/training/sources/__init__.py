"""Readers of training data, one form each, behind ``read_source``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedloom.config.training import TrainingStage
from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.formats import files_at
from embedloom.storage import Place
from embedloom.training.sources.beir import read_beir
from embedloom.training.sources.columns import read_flagembedding, read_sentence_transformers
from embedloom.training.sources.example import SourceExample, not_empty
from embedloom.training.sources.nemo import read_nemo_json
from embedloom.training.sources.nemotron import read_embed_nemotron
from embedloom.training.sources.own import read_examples

_BY_ROW = {
    "sentence_transformers": read_sentence_transformers,
    "flagembedding": read_flagembedding,
}
_WITH_CORPUS = {
    "beir": read_beir,
    "nemo_json": read_nemo_json,
    "embed_nemotron": read_embed_nemotron,
}


def read_source(source: TrainingSource, mined: Place | None, scratch: Path) -> Iterator[SourceExample]:
    """The examples of a source in their own order, a few at a time; bad rows among them.

    Args:
        source: what to read.
        mined: the run's own mined examples.
        scratch: empty local folder for corpora whose texts are looked up by id; may be deleted afterwards.

    Raises:
        DataError: nothing there, or files that do not fit the format; the message names the source.
    """
    if source.format in _WITH_CORPUS:
        return not_empty(source, _WITH_CORPUS[source.format](source, scratch))
    if source.format in _BY_ROW:
        return not_empty(source, _BY_ROW[source.format](source))
    place = mined if source.format == "mined" else Place(source.path or "")
    if place is None:
        raise DataError(f"source {source.name!r}: this stage was given no mined examples")
    return not_empty(source, read_examples(source, place))


def source_state(source: TrainingSource) -> dict[str, Any]:
    """Name, size and time of every file of a source, for fingerprints; mined examples have their own.

    What is not there has an empty state: a run can be planned away from its data, and only building it needs them.
    """
    state: dict[str, Any] = {}
    for path in (source.path, *source.local_texts.values()):
        if path is None or "://" in path:
            continue
        state[path] = {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in files_at(path)}
    return state


def stage_state(stage: TrainingStage) -> dict[str, Any]:
    """The state of all sources of a stage, by name."""
    return {source.name: source_state(source) for source in stage.sources}
