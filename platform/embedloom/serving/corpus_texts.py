"""The texts behind the rows of a vectors artefact, read from the input it was embedded from.

The artefact's ``rows/`` says for each vector which file and row its text stands in, and the text's digest: a text that
was edited since is not shown as if it were what was embedded.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.artefacts import MANIFEST_FILE, Artefact, fingerprint
from embedloom.config.use import EmbeddingConfig
from embedloom.errors import DataError
from embedloom.retrieval.inputs import DOCUMENTS_FOLDER, TextSource, open_input
from embedloom.retrieval.scan import ROWS_FOLDER, text_digest, texts_of
from embedloom.storage import Place

_MEMORY_BYTES = 512 * 2**20  # of texts kept ready; files beyond it are read again, row group by row group
_NONE: tuple[None, None] = (None, None)

Rows = np.ndarray[Any, np.dtype[np.int64]]


class CorpusTexts:
    """Title and text of rows."""

    def __init__(self, source: TextSource, rows: pa.Table) -> None:
        self._source = source
        self._files = rows.column("file").to_numpy()
        self._rows = rows.column("row").to_numpy()
        self._digests = rows.column("digest").combine_chunks()
        self._kept: dict[int, pa.Table] = {}
        self._room = _MEMORY_BYTES

    def read(self, rows: Rows) -> list[tuple[str | None, str | None]]:
        """Title and text of each row; (None, None) where the text is no longer the embedded one."""
        return [self._read(int(row)) for row in rows]

    def _read(self, row: int) -> tuple[str | None, str | None]:
        file, number = int(self._files[row]), int(self._rows[row])
        if file >= len(self._source.files) or number >= self._source.files[file][1]:
            return _NONE
        table = self._row(file, number)
        if text_digest(texts_of(table, self._source)[0]) != self._digests[row].as_py():
            return _NONE
        title = table.column(self._source.title)[0].as_py() if self._source.title else None
        return title or None, table.column(self._source.text)[0].as_py()

    def _row(self, file: int, number: int) -> pa.Table:
        name, columns = self._source.files[file][0], self._source.columns
        if file not in self._kept:
            whole = self._source.place.read_table(name, columns) if self._room > 0 else None
            if whole is None or whole.nbytes > self._room:
                return self._source.place.read_rows(name, number, number + 1, columns)
            self._kept[file] = whole
            self._room -= whole.nbytes
        return self._kept[file].slice(number, 1)


def open_texts(vectors: Artefact, documents: str | None) -> CorpusTexts | None:
    """The texts of a vectors artefact, or None where they are nowhere to be found.

    Args:
        vectors: the artefact.
        documents: the input it was embedded from; None takes the copy that the artefact holds (of JSON lines and
            text files), or the corpus artefact beside it, if it is the one that was embedded.

    Raises:
        DataError: an input that cannot be read, or the artefact says of no row where its text stands.
    """
    place = vectors.place
    source = _source(vectors, documents)
    if source is None:
        return None
    names = place.names(ROWS_FOLDER, ".parquet")
    if not names:
        raise DataError(
            f"{place.uri}/{ROWS_FOLDER}: missing, so which text belongs to which vector is unknown; embed again"
        )
    tables = [place.read_table(name, ["file", "row", "digest"]) for name in names]
    texts = CorpusTexts(source, pa.concat_tables(tables))
    if documents is not None and texts.read(np.zeros(1, np.int64))[0] == _NONE:
        raise DataError(
            f"serving.documents: {documents}: is not what {place.uri} was embedded from, or has changed since"
        )
    return texts


def _source(vectors: Artefact, documents: str | None) -> TextSource | None:
    # Columns of other names than these would have to be stated again; the digest finds out.
    config = EmbeddingConfig()
    place = vectors.place
    if place.exists(f"{DOCUMENTS_FOLDER}.json"):  # JSON lines and text files were copied here
        copied = place.names(DOCUMENTS_FOLDER, ".parquet")
        return open_input(str(place.local / DOCUMENTS_FOLDER), config, place) if copied else None
    if documents is not None:
        return open_input(documents, config, place)
    if not place.is_local:
        return None
    beside = place.local.parent / "corpus"
    if not (beside / MANIFEST_FILE).is_file():
        return None
    corpus = Artefact.open(Place(str(beside)), "corpus")
    # A run states the corpus's own fingerprint, `embedloom embed CORPUS` that of its state.
    known = {corpus.fingerprint, fingerprint(corpus.fingerprint)}
    embedded = not known.isdisjoint(vectors.manifest["inputs"].values())
    return open_input(str(beside), config, place) if embedded else None
