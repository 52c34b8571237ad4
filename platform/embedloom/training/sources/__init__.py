"""Readers of training data, one form each, behind ``read_source``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedloom.config.training_data import TrainingSource
from embedloom.contents import Contents, digest, path_contents
from embedloom.errors import DataError
from embedloom.formats import files_at
from embedloom.storage import Place
from embedloom.training.sources.beir import read_beir
from embedloom.training.sources.columns import read_flagembedding, read_sentence_transformers
from embedloom.training.sources.example import SourceExample, not_empty
from embedloom.training.sources.nemo import corpus_folders, read_nemo_json
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


def source_contents(source: TrainingSource) -> dict[str, Contents]:
    """What the files of a source hold, by the path the config names; mined examples have their own fingerprint.

    What is not there is left out: a run can be planned away from its data, and only building it needs them.
    """
    found: dict[str, Contents] = {}
    for path in (source.path, *source.local_texts.values()):
        if path is None or "://" in path or not files_at(path):
            continue
        found[path] = path_contents(path)
        if source.format == "nemo_json":
            for folder in corpus_folders(Path(path).expanduser()):
                found[str(folder)] = path_contents(str(folder))
    return found


def source_state(source: TrainingSource) -> dict[str, Any]:
    """What decides a source's rows: its section, and what its files hold wherever they lie."""
    contents = source_contents(source)
    settings = source.model_dump(mode="json")
    if source.path in contents:
        settings["path"] = None
    settings["local_texts"] = {
        name: None if path in contents else path for name, path in source.local_texts.items()
    }
    return {"settings": settings, "contents": [digest(one) for one in contents.values()]}
