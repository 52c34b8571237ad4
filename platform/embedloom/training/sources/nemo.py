"""Reader of NeMo AutoModel training files: one JSON with questions and document ids, and Parquet corpora beside it.

The JSON is one document and is read whole; corpora stay on disk.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.formats import PARQUET_ENDINGS, files_at, json_object
from embedloom.training.sources.example import SourceExample, bad_row, plain_example
from embedloom.training.sources.tables import parquet_columns
from embedloom.training.sources.texts import TextTable

_FIELDS = ("question_id", "question", "corpus_id", "pos_doc", "neg_doc")
# NeMo writes the corpora first, so that a file of gigabytes need not be parsed to know them.
_CORPUS_KEY = re.compile(r'\s*\{\s*"corpus"\s*:\s*')
_HEAD_CHARACTERS = 2**20
_METADATA = "merlin_metadata.json"
# What NeMo puts around the task in ``query_instruction``; our contract has its own template.
_WRAPPING = ("Instruct: ", "\nQuery:")


class Corpora:
    """The corpora of one training file, by ``corpus_id``."""

    def __init__(self) -> None:
        self._texts: dict[str, TextTable] = {}
        self.instructions: dict[str, str | None] = {}

    def add(self, folder: Path, scratch: Path) -> None:
        """Open the corpus of a folder.

        Raises:
            DataError: no metadata, no Parquet file, or an id that another folder has.
        """
        metadata = json_object(folder / _METADATA)
        corpus_id = str(metadata.get("corpus_id") or "")
        if not corpus_id or corpus_id in self._texts:
            raise DataError(
                f"{folder / _METADATA}: corpus_id {corpus_id!r} is {'used twice' if corpus_id else 'missing'}"
            )
        files = [path for path in files_at(str(folder)) if path.suffix in PARQUET_ENDINGS]
        if not files:
            raise DataError(f"{folder}: no Parquet file with the corpus {corpus_id!r}")
        rows = (
            (str(row["id"]), str(row["text"]))
            for path in files
            for row in parquet_columns(path, ["id", "text"])
        )
        self._texts[corpus_id] = TextTable.build(scratch / f"corpus-{len(self._texts)}", rows)
        self.instructions[corpus_id] = bare_instruction(metadata.get("query_instruction"))

    def text(self, corpus_id: str, document: Any) -> tuple[str, str | None]:
        """(id, text) of a document entry, ``{"id": ...}`` or the id itself."""
        key = str(document["id"] if isinstance(document, dict) else document)
        table = self._texts.get(corpus_id)
        return key, table.get(key) if table is not None else None


def corpus_folders(path: Path) -> list[Path]:
    """Folders of the corpora that a training file names; none where it does not say so properly."""
    try:
        with path.open(encoding="utf-8") as stream:
            head = stream.read(_HEAD_CHARACTERS)
            named = _CORPUS_KEY.match(head)
            corpus = (
                json.JSONDecoder().raw_decode(head, named.end())[0]
                if named
                else json.loads(head + stream.read())["corpus"]
            )
    except (OSError, ValueError, KeyError, TypeError):
        return []
    entries = corpus if isinstance(corpus, list) else [corpus]
    names = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    return [path.parent / name for name in names if isinstance(name, str)]


def read_nemo_json(source: TrainingSource, scratch: Path) -> Iterator[SourceExample]:
    """Rows of a training file; the first positive counts, as in NeMo, and the others are right answers too.

    Raises:
        DataError: not such a file, or a corpus that is missing.
    """
    path = Path(source.path or "").expanduser()
    content = json_object(path)
    corpus, rows = content.get("corpus"), content.get("data")
    if not isinstance(rows, list) or corpus is None:
        raise DataError(f"{path}: needs the keys 'corpus' and 'data', found {list(content)}")
    corpora = Corpora()
    for entry in corpus if isinstance(corpus, list) else [corpus]:
        folder = entry.get("path") if isinstance(entry, dict) else entry
        if not isinstance(folder, str):
            raise DataError(f"{path}: corpus is {entry!r}; allowed: {{'path': folder}}, or a list of them")
        corpora.add(path.parent / folder, scratch)
    for number, row in enumerate(rows):
        missing = [field for field in _FIELDS if field not in row] if isinstance(row, dict) else list(_FIELDS)
        if missing:
            raise DataError(f"{path}: row {number} of data has no field {missing[0]!r}")
        yield joined(source, corpora, row)


def joined(source: TrainingSource, corpora: Corpora, row: dict[str, Any]) -> SourceExample:
    """An example with its documents' texts; one that names an unknown document is a bad row."""
    row_id, corpus_id = str(row["question_id"]), str(row["corpus_id"])
    entries = [*row["pos_doc"][:1], *row["neg_doc"]]
    found = [corpora.text(corpus_id, entry) for entry in entries]
    unknown = next((key for key, text in found if text is None), None)
    if unknown is not None:
        return bad_row(row_id, "unknown_document", f"{unknown!r} is not in the corpus {corpus_id!r}")
    texts = [text for _, text in found]
    has_positive = len(row["pos_doc"]) > 0
    positive = texts[0] if has_positive else None
    own = corpora.instructions.get(corpus_id)
    others = [corpora.text(corpus_id, entry)[1] for entry in row["pos_doc"][1:]]
    return plain_example(source, row_id, row["question"], positive, texts[has_positive:], own, others)


def bare_instruction(instruction: Any) -> str | None:
    """The task sentence out of ``Instruct: <task>\\nQuery:``; any other text as it is, nothing for none."""
    if not isinstance(instruction, str) or not instruction.strip():
        return None
    return instruction.strip().removeprefix(_WRAPPING[0]).removesuffix(_WRAPPING[1]).strip() or None
