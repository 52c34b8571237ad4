"""Reader of a subset of nvidia/embed-nemotron-dataset-v1, downloaded: ``queries.parquet`` and ``corpus.parquet``.

Some subsets ship ids only, for their licence (``ids_only`` in ``dataset_metadata.json``). ``source_config.json`` then
names the original data: ``source_repo``, and a ``loader_config`` of ``column`` (one table, whose ``query_column`` and
``document_column`` hold the texts) or ``mteb`` (a corpus and a table of queries). Ids are ``q_<row>`` and ``d_<row>``
of those tables, whose local copy ``local_texts`` must name.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.formats import JSONL_ENDINGS, PARQUET_ENDINGS, files_at, json_object, records_of
from embedloom.instructions import document_text
from embedloom.training.sources.example import SourceExample, bad_row, plain_example
from embedloom.training.sources.nemo import bare_instruction
from embedloom.training.sources.tables import parquet_columns
from embedloom.training.sources.texts import TextTable

_QUERY_COLUMNS = ["question_id", "question", "pos_doc", "neg_doc"]
_LOADERS = ("column", "mteb")


def read_embed_nemotron(source: TrainingSource, scratch: Path) -> Iterator[SourceExample]:
    """Rows of one subset's folder; the first positive counts, as in NeMo, and the others are right answers too.

    Raises:
        DataError: a file that is missing or does not fit, or ids without their texts.
    """
    root = Path(source.path or "").expanduser()
    metadata = json_object(root / "dataset_metadata.json")
    own = bare_instruction(metadata.get("query_instruction"))
    if metadata.get("ids_only"):
        queries, documents = _original_texts(source, root, scratch)
        columns = [column for column in _QUERY_COLUMNS if column != "question"]
    else:
        rows = parquet_columns(root / "corpus.parquet", ["id", "text"])
        pairs = ((str(row["id"]), str(row["text"])) for row in rows)
        queries, documents = None, TextTable.build(scratch / "corpus", pairs)
        columns = _QUERY_COLUMNS
    for row in parquet_columns(root / "queries.parquet", columns):
        row_id = str(row["question_id"])
        query = queries.get(row_id) if queries is not None else row["question"]
        keys = [_id_of(entry) for entry in (*(row["pos_doc"] or [])[:1], *(row["neg_doc"] or []))]
        texts = [documents.get(key) for key in keys]
        if query is None or None in texts:
            missing = row_id if query is None else keys[texts.index(None)]
            yield bad_row(row_id, "unknown_document", f"{missing!r} has no text")
            continue
        split = 1 if row["pos_doc"] else 0
        others = [documents.get(_id_of(entry)) for entry in (row["pos_doc"] or [])[1:]]
        yield plain_example(source, row_id, query, texts[0] if split else None, texts[split:], own, others)


def _original_texts(source: TrainingSource, root: Path, scratch: Path) -> tuple[TextTable, TextTable]:
    path = root / "source_config.json"
    config = json_object(path)
    repo, loader = config.get("source_repo"), config.get("loader_config")
    if loader not in _LOADERS:
        raise DataError(f"{path}: loader_config is {loader!r}; allowed: {list(_LOADERS)}")
    if repo not in source.local_texts:
        raise DataError(
            f"source {source.name!r}: {root} ships ids only; local_texts must say where {repo!r} lies, found {sorted(source.local_texts)}"
        )
    local = Path(source.local_texts[repo]).expanduser()
    if loader == "mteb":
        queries = (str(row.get("text")) for row in _rows(source, _one_of(local, "queries")))
        corpus = _rows(source, _one_of(local, "corpus"))
        documents = (document_text(row.get("title"), str(row.get("text"))) for row in corpus)
    else:
        queries = (str(row[config["query_column"]]) for row in _rows(source, local, config["query_column"]))
        document_column = config["document_column"]
        documents = (str(row[document_column]) for row in _rows(source, local, document_column))
    return (
        TextTable.build(scratch / "queries", _numbered("q", queries)),
        TextTable.build(scratch / "documents", _numbered("d", documents)),
    )


def _numbered(prefix: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((f"{prefix}_{number}", text) for number, text in enumerate(texts))


def _rows(source: TrainingSource, path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """Records of a file, or of all files of a folder in name order."""
    endings = (*PARQUET_ENDINGS, *JSONL_ENDINGS)
    files = [file for file in files_at(str(path)) if file.name.lower().endswith(endings)]
    if not files:
        raise DataError(f"source {source.name!r}: {path} (local_texts) has no Parquet or JSON-lines file")
    for file in files:
        for number, row in records_of(file):
            if column is not None and column not in row:
                raise DataError(f"{file}: row {number} has no column {column!r}; found {list(row)}")
            yield row


def _one_of(folder: Path, stem: str) -> Path:
    found = [path for path in files_at(str(folder)) if path.name.split(".")[0] == stem]
    if not found:
        raise DataError(f"{folder}: no {stem}.parquet or {stem}.jsonl, which the mteb form has")
    return found[0]


def _id_of(entry: Any) -> str:
    return str(entry["id"] if isinstance(entry, dict) else entry)
