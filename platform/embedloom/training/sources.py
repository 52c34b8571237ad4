"""Readers of training data, one form each, behind ``read_source``; and the state of a source for fingerprints."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.config.training import MEAN_OF_TEACHERS, TrainingSource
from embedloom.core.contents import Contents, digest, path_contents
from embedloom.core.prompting import document_text
from embedloom.core.schemas import (
    SCHEMAS,
    TEACHER_SCORES_FOLDER,
    TEACHER_SCORES_SCHEMA,
    check_table,
)
from embedloom.core.storage import (
    JSONL_ENDINGS,
    PARQUET_ENDINGS,
    Place,
    beir_entries,
    files_at,
    is_remote,
    json_lines,
    json_object,
    judgements,
    located,
    parquet_records,
    records_of,
)
from embedloom.core.text_table import TextTable
from embedloom.errors import DataError

# Their documents are label names, which carry no instruction (arXiv 2511.07025 §3.1).


@dataclass(frozen=True, slots=True)
class SourceExample:
    """Texts of one query; an empty text or ``problem`` makes it a bad row."""

    id: str
    query: str
    positive: str
    negatives: list[str]
    task_type: str
    instruction: str | None  # of the query; None: the contract's own for the task type
    document_instruction: str | None = ""  # before the documents too; None: bare; "": as the contract has it
    dataset: str = ""  # which set the row is of, where its source holds several
    problem: tuple[str, str] | None = None  # reason and detail
    others: tuple[str, ...] = ()  # further right answers: not trained towards here, and never negatives
    scores: list[float] = field(
        default_factory=list
    )  # a teacher's: of the positive, then of each negative; NaN where it has none. Empty: no teacher's


def bad_row(row_id: str, reason: str, detail: str) -> SourceExample:
    """A row that cannot become an example."""
    return SourceExample(row_id, "", "", [], "retrieval", None, None, problem=(reason, detail))


def plain_example(
    source: TrainingSource,
    row_id: str,
    query: Any,
    positive: Any,
    negatives: list[Any],
    own_instruction: str | None = None,
    others: Iterable[Any] = (),
    scores: Sequence[float] = (),
) -> SourceExample:
    """An example of a format whose rows state no task type; values that are no texts make it a bad row.

    Scores are a teacher's of the positive and of each negative, or none.
    """
    for name, value in (("query", query), ("positive", positive)):
        if value is not None and not isinstance(value, str):
            return bad_row(row_id, "not_text", f"{name} is a {type(value).__name__}")
    wrong = next((value for value in negatives if not isinstance(value, str)), None)
    if wrong is not None:
        return bad_row(row_id, "not_text", f"a negative is a {type(wrong).__name__}")
    kept = [at for at, text in enumerate(negatives) if text.strip()]
    return SourceExample(
        row_id, query or "", positive or "", [negatives[at] for at in kept],
        source.task_type, source.instruction or own_instruction,
        others=tuple(text for text in others if isinstance(text, str) and text.strip()),
        scores=[scores[0], *(scores[1 + at] for at in kept)] if scores else [],
    )  # fmt: skip


def teacher_scores(values: Any, negatives: int) -> list[float]:
    """A teacher's scores of a row: of the positive, then of each negative.

    Args:
        values: as the row holds them: 1 + ``negatives`` numbers, or as many margins as there are negatives, each the
            positive's score less the negative's (sentence-transformers' MarginMSELoss reads both); a lone number is one
            margin. A null is a score that is not known.
        negatives: of the row.

    Returns:
        The scores, with margins as those below a positive of 0; nothing where the values are no such list.
    """
    listed = values if isinstance(values, list) else [values]
    if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in listed):
        return []
    known = [math.nan if value is None else float(value) for value in listed]
    if len(known) == negatives:
        return [0.0, *(-value for value in known)]
    return known if len(known) == 1 + negatives else []


def is_scored(scores: Sequence[float], negatives: int) -> bool:
    """Whether a teacher has said something of a row's positive and of one of its first negatives at least."""
    known = [math.isfinite(score) for score in scores[: 1 + negatives]]
    return any(known[1:]) and known[0]


def not_empty(source: TrainingSource, examples: Iterator[SourceExample]) -> Iterator[SourceExample]:
    """The examples; a source without any is an error.

    Raises:
        DataError: nothing came.
    """
    empty = True
    for example in examples:
        empty = False
        yield example
    if empty:
        raise no_rows(source)


def no_rows(source: TrainingSource) -> DataError:
    """What to raise for a source that gives nothing."""
    return DataError(f"source {source.name!r}: {source.path or 'mined examples'} has no rows")


# Records of Parquet and JSON-lines files, for the readers of foreign formats.


def source_files(source: TrainingSource, endings: tuple[str, ...]) -> list[Path]:
    """The source's files with one of these endings, sorted.

    Raises:
        DataError: none.
    """
    found = [path for path in files_at(source.path or "") if path.name.lower().endswith(endings)]
    if not found:
        raise DataError(
            f"source {source.name!r}: {source.path!r} ({source.format}) has no file ending in {', '.join(endings)}"
        )
    return found


def records(source: TrainingSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name:row number, record) of Parquet and JSON-lines files."""
    for path in source_files(source, (*PARQUET_ENDINGS, *JSONL_ENDINGS)):
        for number, record in records_of(path):
            yield f"{path.name}:{number}", record


def parquet_columns(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Records of these columns of one Parquet file.

    Raises:
        DataError: not there, not Parquet, or without a column.
    """

    def wanted(names: list[str]) -> list[str]:
        missing = [column for column in columns if column not in names]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}; found {names}")
        return columns

    return (record for _, record in parquet_records(path, wanted))


_BATCH_ROWS = 1024

# Reader of our own ``examples`` tables.


def example_files(source: TrainingSource, place: Place) -> list[tuple[str, int]]:
    """(name, rows) of ``examples/*.parquet`` below a place (or right in it), from the footers.

    Raises:
        DataError: no Parquet file, or columns that do not fit.
    """
    names = place.names("examples", ".parquet") or place.names("", ".parquet")
    if not names:
        raise DataError(f"source {source.name!r}: {place.uri} has no examples/*.parquet")
    found = []
    for name in names:
        schema, rows = place.parquet_footer(name)
        if missing := [column for column in SCHEMAS["examples"].required if column not in schema.names]:
            raise DataError(
                f"source {source.name!r}: {place.uri}/{name} has no column {missing[0]!r}; found {schema.names}"
            )
        found.append((name, rows))
    return found


def read_example_rows(
    source: TrainingSource, place: Place, name: str, start: int, stop: int, teacher: str | None = None
) -> Iterator[SourceExample]:
    """Those of some rows of one examples file that are of the source's dataset, or all where it names none.

    Args:
        source: what to read.
        place: of the examples.
        name: of the file.
        start: first row.
        stop: the row after the last.
        teacher: whose scores they are to have, see ``teachers_scores``; None: those that their negatives were chosen by.
    """
    table = place.read_rows(name, start, stop, _example_columns(place, name))
    if teacher is not None:
        table = teachers_scores(source, place, name, table, start, teacher)
    for first in range(0, table.num_rows, _BATCH_ROWS):
        yield from _examples_of(source, table.slice(first, _BATCH_ROWS), f"{place.uri}/{name}")


def teachers_scores(
    source: TrainingSource, place: Place, name: str, examples: pa.Table, start: int, teacher: str
) -> pa.Table:
    """Examples with the scores of one of several teachers, or with the mean of all.

    Args:
        source: named in errors.
        place: of the examples.
        name: of their file.
        examples: some of its rows.
        start: the first of them.
        teacher: its name, or ``mean``.

    Raises:
        DataError: nothing is known of several teachers, not of this one, or of other examples.
    """
    file = f"{TEACHER_SCORES_FOLDER}/{Path(name).name}"
    if not place.exists(file):
        raise DataError(
            f"source {source.name!r}: {place.uri} has no {file}, which training.distillation.teacher: {teacher!r} reads; allowed: "
            "null, or examples of several teachers (those of an earlier version: delete the folder to build them again)"
        )
    rows = place.read_rows(file, start, start + examples.num_rows, TEACHER_SCORES_SCHEMA.names).to_pylist()
    if [row["id"] for row in rows] != examples.column("id").to_pylist():
        raise DataError(f"source {source.name!r}: the ids of {place.uri}/{file} are not those of {name}")
    chosen = [_scores_of(source, row, teacher) for row in rows]
    for column, values in (
        ("positive_score", [own[0] for own in chosen]),
        ("negative_scores", [own[1:] for own in chosen]),
    ):
        at = examples.schema.get_field_index(column)
        examples = examples.set_column(at, column, pa.array(values, SCHEMAS["examples"].columns[column]))
    return examples


def _scores_of(source: TrainingSource, row: dict[str, Any], teacher: str) -> list[float]:
    """Scores of the positive and the negatives; NaN where a teacher that is asked has none."""
    names = row["teachers"]
    if teacher != MEAN_OF_TEACHERS and teacher not in names:
        allowed = ", ".join((*dict.fromkeys(names), MEAN_OF_TEACHERS))
        raise DataError(
            f"source {source.name!r}: training.distillation.teacher: {teacher!r} did not mine it; allowed: {allowed}"
        )
    both = zip(row["positive_scores"], row["negative_scores"], strict=True)
    asked = np.array([[positive, *negatives] for positive, negatives in both], dtype=np.float64)
    found = asked.mean(axis=0) if teacher == MEAN_OF_TEACHERS else asked[names.index(teacher)]
    return [float(score) for score in found]


def read_examples(
    source: TrainingSource, place: Place, teacher: str | None = None
) -> Iterator[SourceExample]:
    """Rows of our own examples, of the source's dataset if it names one; ``teacher`` as of ``read_example_rows``.

    Raises:
        DataError: no Parquet file, or columns that do not fit.
    """
    for name, rows in example_files(source, place):
        if teacher is not None:
            yield from read_example_rows(source, place, name, 0, rows, teacher)
            continue
        for table in place.iter_tables(name, _example_columns(place, name), _BATCH_ROWS):
            yield from _examples_of(source, table, f"{place.uri}/{name}")


def _example_columns(place: Place, name: str) -> list[str]:
    schema, _ = place.parquet_footer(name)
    return [column for column in SCHEMAS["examples"].columns if column in schema.names]


def _examples_of(source: TrainingSource, table: pa.Table, where: str) -> Iterator[SourceExample]:
    for row in check_table("examples", table, where).to_pylist():
        if source.dataset is None or row["dataset"] == source.dataset:
            yield SourceExample(
                row["id"], row["query"], row["positive"], row["negatives"], row["task_type"],
                source.instruction or row["query_instruction"] or None, row["document_instruction"] or None,
                row["dataset"], scores=[row["positive_score"], *row["negative_scores"]],
            )  # fmt: skip


# Readers of formats with one row a query: sentence-transformers columns and FlagEmbedding JSON lines.


_NUMBERED = re.compile(r"^negative_(\d+)$")
_SCORE_COLUMNS = (
    "scores",
    "score",
    "labels",
    "label",
)  # what sentence-transformers' trainer takes for labels


def read_sentence_transformers(source: TrainingSource) -> Iterator[SourceExample]:
    """Rows with an anchor, a positive, and ``negative``, ``negative_1`` ... or a list ``negatives``.

    ``scores``, ``score``, ``labels`` or ``label`` may hold a teacher's scores, see ``teacher_scores``.

    Raises:
        DataError: a row without the two columns; other columns are passed over.
    """
    for place, record in records(source):
        for key, column in (
            ("query_column", source.query_column),
            ("positive_column", source.positive_column),
        ):
            if column not in record:
                raise DataError(
                    f"source {source.name!r}: {place} has no column {column!r} ({key}); found {list(record)}"
                )
        row_id = str(record.get("id") or place)
        negatives = _negatives(record)
        values = next((record[name] for name in _SCORE_COLUMNS if record.get(name) is not None), None)
        yield plain_example(
            source, row_id, record[source.query_column], record[source.positive_column], negatives,
            scores=[] if values is None else teacher_scores(values, len(negatives)),
        )  # fmt: skip


def _negatives(record: dict[str, Any]) -> list[Any]:
    numbered = sorted((int(match[1]), name) for name in record if (match := _NUMBERED.match(name)))
    found = [record["negative"]] if record.get("negative") is not None else []
    found += [record[name] for _, name in numbered if record[name] is not None]
    return found + list(record.get("negatives") or [])


def read_flagembedding(source: TrainingSource) -> Iterator[SourceExample]:
    """Lines with ``query``, ``pos``, ``neg`` and perhaps ``prompt``; the first positive counts, the others are right too.

    A ``prompt`` is taken as the instruction where the source config gives none; ``pos_scores`` and ``neg_scores``, as
    FlagEmbedding's distillation reads them, as a teacher's.

    Raises:
        DataError: a line that is not a JSON object, or lacks a key.
    """
    for path in source_files(source, JSONL_ENDINGS):
        for number, record in json_lines(path):
            place = f"{path.name}:{number}"
            for key in ("query", "pos"):
                if key not in record:
                    raise DataError(
                        f"source {source.name!r}: {place} has no key {key!r}; found {list(record)}"
                    )
            positives, negatives = record["pos"], record.get("neg") or []
            if not isinstance(positives, list) or not isinstance(negatives, list):
                yield bad_row(place, "not_a_list", "pos and neg must be lists of texts")
                continue
            prompt = record.get("prompt")
            yield plain_example(
                source, str(record.get("id") or place), record["query"], positives[0] if positives else None,
                negatives, prompt if isinstance(prompt, str) and prompt else None, positives[1:],
                _flag_scores(record, len(negatives)),
            )  # fmt: skip


def _flag_scores(record: dict[str, Any], negatives: int) -> list[float]:
    of_positives, of_negatives = record.get("pos_scores"), record.get("neg_scores")
    if not isinstance(of_positives, list) or not isinstance(of_negatives, list) or not of_positives:
        return []
    found = [of_positives[0], *of_negatives]
    return teacher_scores(found, negatives) if len(found) == 1 + negatives else []


# Reader of the train judgements of a BEIR folder.


def read_beir(source: TrainingSource, scratch: Path) -> Iterator[SourceExample]:
    """One example a query: its best document (of equals the first by id), and those judged 0 as negatives.

    Its other relevant documents are right answers too, which no row of the query may have as negatives.
    Only ``qrels/train.tsv`` is read: dev and test are the benchmark's own measure.

    Raises:
        DataError: a file that is missing or does not fit.
    """
    root = located(source.path or "")
    files = [root / "corpus.jsonl", root / "queries.jsonl", root / "qrels" / "train.tsv"]
    for path in files:
        if not path.is_file():
            raise DataError(f"source {source.name!r}: {path} is missing; a beir source needs it")
    documents = ((key, document_text(title, text)) for key, title, text in beir_entries(files[0]))
    texts = TextTable.build(scratch / "corpus", documents)
    judged, asked = _judgements(files[2]), set[str]()
    for query_id, _, query in beir_entries(files[1]):
        if query_id not in judged:
            continue
        asked.add(query_id)
        ranked = sorted(judged[query_id], key=lambda entry: (-entry[1], entry[0]))
        positives = [key for key, score in ranked if score > 0]
        found = [texts.get(key) for key in (*positives[:1], *(key for key, score in ranked if score <= 0))]
        if None in found:
            yield bad_row(query_id, "unknown_document", "a judged document is not in corpus.jsonl")
            continue
        split = 1 if positives else 0
        others = (texts.get(key) for key in positives[1:])
        yield plain_example(
            source, query_id, query, found[0] if split else None, found[split:], others=others
        )
    for query_id in judged:
        if query_id not in asked:
            yield bad_row(query_id, "unknown_query", "a judged query is not in queries.jsonl")


def _judgements(path: Path) -> dict[str, list[tuple[str, float]]]:
    judged: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for query_id, document_id, score in judgements(path):
        judged[query_id].append((document_id, score))
    return judged


# Reader of NeMo AutoModel training files: one JSON with questions and document ids, and Parquet corpora beside it.
#
# The JSON is one document and is read whole; corpora stay on disk.


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
    path = located(source.path or "")
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


# Reader of a subset of nvidia/embed-nemotron-dataset-v1, downloaded: ``queries.parquet`` and ``corpus.parquet``.
#
# Some subsets ship ids only, for their licence (``ids_only`` in ``dataset_metadata.json``). ``source_config.json`` then
# names the original data: ``source_repo``, and a ``loader_config`` of ``column`` (one table, whose ``query_column`` and
# ``document_column`` hold the texts) or ``mteb`` (a corpus and a table of queries). Ids are ``q_<row>`` and ``d_<row>``
# of those tables, whose local copy ``local_texts`` must name.


_QUERY_COLUMNS = ["question_id", "question", "pos_doc", "neg_doc"]
_LOADERS = ("column", "mteb")


def read_embed_nemotron(source: TrainingSource, scratch: Path) -> Iterator[SourceExample]:
    """Rows of one subset's folder; the first positive counts, as in NeMo, and the others are right answers too.

    Raises:
        DataError: a file that is missing or does not fit, or ids without their texts.
    """
    root = located(source.path or "")
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
    local = located(source.local_texts[repo])
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


_BY_ROW = {
    "sentence_transformers": read_sentence_transformers,
    "flagembedding": read_flagembedding,
}
_WITH_CORPUS = {
    "beir": read_beir,
    "nemo_json": read_nemo_json,
    "embed_nemotron": read_embed_nemotron,
}


def read_source(
    source: TrainingSource, mined: Place | None, scratch: Path, teacher: str | None = None
) -> Iterator[SourceExample]:
    """The examples of a source in their own order, a few at a time; bad rows among them.

    Args:
        source: what to read.
        mined: the run's own mined examples.
        scratch: empty local folder for corpora whose texts are looked up by id; may be deleted afterwards.
        teacher: of our own examples, see ``read_example_rows``.

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
    return not_empty(source, read_examples(source, place, teacher))


# Rows of a source as they were read, in Parquet files of one length: what tasks on other machines take their share of.
#
# Only a machine that has a source's files can read it, and most forms are read from the first byte to the last, or with
# a corpus beside them; 5,000 rows a second and core, of which a core tokenizes a hundred.


_ROW_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("query", pa.string()),
        ("positive", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("task_type", pa.string()),
        ("instruction", pa.string()),
        ("document_instruction", pa.string()),
        ("dataset", pa.string()),
        ("problem", pa.list_(pa.string())),
        ("others", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)


def row_table(examples: Sequence[SourceExample]) -> pa.Table:
    """Examples as a table."""
    columns = {name: [getattr(example, name) for example in examples] for name in _ROW_SCHEMA.names}
    return pa.table(columns, schema=_ROW_SCHEMA)


def rows_of_table(table: pa.Table) -> Iterator[SourceExample]:
    """The examples of ``row_table``."""
    for batch in table.to_batches(_BATCH_ROWS):
        for row in batch.to_pylist():
            problem = None if row["problem"] is None else tuple(row["problem"])
            yield SourceExample(**{**row, "problem": problem, "others": tuple(row["others"])})


def reads_by_range(source: TrainingSource) -> bool:
    """Whether every machine can read any rows of a source by itself: our own tables, in the run's or an object store."""
    return source.format == "mined" or (source.format == "examples" and "://" in (source.path or ""))


def source_bytes(source: TrainingSource) -> int:
    """Size of the files that a source names."""
    paths = [path for path in (source.path, *source.local_texts.values()) if path]
    return sum(file.stat().st_size for path in paths for file in files_at(path))


def with_absolute_paths(source: TrainingSource) -> TrainingSource:
    """The source for processes with another working directory."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    texts = {name: absolute(path) for name, path in source.local_texts.items()}
    path = None if source.path is None else absolute(source.path)
    return source.model_copy(update={"path": path, "local_texts": texts})


def source_contents(source: TrainingSource) -> dict[str, Contents]:
    """What the files of a source hold, by the path the config names; mined examples have their own fingerprint.

    What is not there is left out: a run can be planned away from its data, and only building it needs them.
    """
    found: dict[str, Contents] = {}
    for path in (source.path, *source.local_texts.values()):
        if path is None or (is_remote(path) and reads_by_range(source)) or not files_at(path):
            continue
        found[path] = path_contents(path)
        if source.format == "nemo_json":
            for folder in corpus_folders(located(path)):
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
