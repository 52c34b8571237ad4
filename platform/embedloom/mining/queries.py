"""The queries to mine: the pairs of all artefacts in one table, with the texts that come along with them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.compute.shards import PART_PATTERN
from embedloom.core.artefacts import Artefact
from embedloom.core.ids import IdSet
from embedloom.core.progress import note
from embedloom.core.prompting import (
    LABEL_TASK_TYPES,
    Side,
    check_task_type,
    is_instructed,
    opposite_task_type,
)
from embedloom.core.schemas import check_table, content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.core.text import folded, hash64, hashes64
from embedloom.errors import DataError
from embedloom.mining.select import query_seed

# Texts that come with pairs: positives the corpus lacks, given negatives, and the labels of a classification task.


GIVEN_FOLDER = "given"
CORPUS = "corpus"  # the collection of the corpus's own documents
# Texts that are scored but never searched.
UNSEARCHED = "unsearched"
_WRONG_LABELS = 16  # drawn per query; the selection takes the first few
GIVEN_SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("task_type", pa.string()), ("instruction", pa.string())]
)


def wrong_labels(labels: Sequence[str], right: Collection[str], query_id: str) -> list[str]:
    """Labels drawn at random among the wrong ones of a task (paper §3.2), the same for the same query id."""
    known = {folded(label) for label in right}
    wrong = [label for label in labels if folded(label) not in known]
    order = np.random.default_rng(query_seed(query_id, "labels")).permutation(len(wrong))
    return [wrong[number] for number in order[:_WRONG_LABELS]]


class GivenTexts:
    """Writes each given text once, into the collection that is searched, or else into ``unsearched``."""

    def __init__(self, out: Place, shard_rows: int) -> None:
        self._out = out
        self._shard_rows = shard_rows
        self._seen: dict[str, set[str]] = {}
        self._waiting: dict[str, list[dict[str, str]]] = {}
        self._parts: dict[str, int] = {}

    def add(self, row: dict[str, Any], name: Callable[[str, str, str], str]) -> None:
        """Take the texts of one query row; ``name`` gives their ids."""
        group = UNSEARCHED if row["collection"] == CORPUS else row["collection"]
        for text in [row["positive"] or "", *(row["negatives"] or [])]:
            identifier = name(text, row["task_type"], row["instruction"])
            seen = self._seen.setdefault(group, set())
            if identifier in seen or not text.strip():
                continue
            seen.add(identifier)
            waiting = self._waiting.setdefault(group, [])
            waiting.append(
                {
                    "id": identifier,
                    "text": text,
                    "task_type": opposite_task_type(row["task_type"]),
                    "instruction": row["instruction"],
                }
            )
            if len(waiting) == self._shard_rows:
                self._write(group)

    def finish(self) -> list[str]:
        """Write what is left; names of the groups."""
        for group in list(self._waiting):
            self._write(group)
        return sorted(self._parts)

    def _write(self, group: str) -> None:
        number = self._parts.get(group, 0)
        table = pa.Table.from_pylist(self._waiting.pop(group), schema=GIVEN_SCHEMA)
        self._out.write_table(f"{GIVEN_FOLDER}/{group}/{PART_PATTERN.format(number)}", table)
        self._parts[group] = number + 1


# Gathering the pairs of all artefacts into one table of queries to mine, in parts of one collection each.
#
# A collection is what a query's negatives are searched in: ``corpus``, or, for texts that stand opposite each other
# (STS, bitext) and come with the pairs, the other texts of the same dataset and task type.


QUERIES_FOLDER = "queries"
REJECTS_FOLDER = "rejects"
COUNTS_FILE = "queries.json"  # written last: the queries are all there
# Negatives of these come from the dataset's own texts where the corpus does not hold them (recipe of the paper, §3.2).
_PAIRED_TASK_TYPES = ("sts", "bitext", "pair_classification", "clustering")

_TEXTS = pa.list_(pa.string())
QUERY_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("instruction", pa.string()),
        ("part", pa.string()),  # name of this row's file, which its vectors and results share
        ("collection", pa.string()),
        ("document_id", pa.string()),  # of the positive in its collection
        ("known_positives", _TEXTS),  # document ids of every pair with this query, this one included
        ("positive", pa.string()),  # given with the pair; null if the corpus has document_id
        ("negatives", _TEXTS),  # given with the pair, or wrong labels; replace mined ones
        ("task_type", pa.string()),
        ("dataset", pa.string()),
        ("rights", _TEXTS),  # texts given as right answers to this query with other pairs; null: none
    ]
)
_Source = tuple[Place, str]
TooLong = Callable[[str, Side, str, str], str | None]


def pair_files(corpus: Artefact, others: list[Artefact]) -> list[_Source]:
    """(place, file) of every pairs file to mine: the corpus's training pairs, then each further artefact's.

    Raises:
        DataError: no pairs anywhere.
    """
    folders = [(corpus.place, "pairs/train"), *((artefact.place, "pairs") for artefact in others)]
    files = [(place, name) for place, folder in folders for name in place.names(folder, ".parquet")]
    if not files:
        raise DataError(
            f"mining: no pairs in {' or '.join(f'{place.uri}/{folder}' for place, folder in folders)}"
        )
    return files


def write_queries(
    files: list[_Source], corpus: _Source, out: Place, shard_rows: int, too_long: TooLong | None = None
) -> dict[str, Any]:
    """Write ``queries/``, the texts that come with pairs (``given/<collection>/``) and ``rejects/``, once.

    Args:
        files: pairs files in order; all rows of one, then the next.
        corpus: place and folder of the documents.
        out: the artefact's place.
        shard_rows: rows per part.
        too_long: says why a teacher would see next to nothing of a text (side, task type, instruction), if so.

    Returns:
        ``{"rows", "pairs": {origin: n}, "rejects": {reason: n}, "cleaned": {reason: n}, "parts": {collection: [names]},
        "given": [collections]}``; ``cleaned`` counts given negatives that are right answers or the query itself.

    Raises:
        DataError: a pair id twice, an unknown task type, or no row at all.
    """
    if out.exists(COUNTS_FILE):
        return out.read_json(COUNTS_FILE)
    _check_ids(files)
    writer = _Writer(files, corpus, out, shard_rows, too_long)
    for table in _in_parts(files, shard_rows):
        writer.add(table.to_pylist())
    counts = writer.finish()
    if writer.swallowed_by:
        count = counts["rejects"]["instruction_too_long"]
        note("mine", f"{count:,} pairs left out, instruction_too_long: {writer.swallowed_by}")
    if not counts["rows"]:
        raise DataError(
            f"mining: no usable pair in {files[0][0].uri}/{files[0][1]} or the {len(files) - 1} files after it; rejects: {counts['rejects']}"
            + (f"; {writer.swallowed_by}" if writer.swallowed_by else "")
        )
    out.write_json(COUNTS_FILE, counts)
    return counts


def inline_id(text: str, task_type: str, instruction: str) -> str:
    """Id of a text that comes with a pair; the instruction belongs to it where documents carry one."""
    return content_id("inline", text, task_type, instruction if is_instructed("document", task_type) else "")


def question_of(query: str, task_type: str, instruction: str) -> str:
    """What two pairs must share to ask the same: the query, case and blanks aside; of labels also the task, since a
    text may have another label in the next one."""
    return f"{folded(query)}\0{instruction if task_type in LABEL_TASK_TYPES else ''}"


@dataclass(slots=True)
class _Answers:
    """The right answers to a question, over all pairs."""

    documents: set[str] = field(default_factory=set)  # ids
    texts: set[str] = field(default_factory=set)  # those that came with the pairs


class _Writer:
    """Sorts pairs into collections and writes a part whenever one is full."""

    def __init__(
        self, files: list[_Source], corpus: _Source, out: Place, shard_rows: int, too_long: TooLong | None
    ) -> None:
        self._out = out
        self._too_long = too_long
        self.swallowed_by = ""  # the first instruction that is too long, with its numbers
        self._shard_rows = shard_rows
        self._answers = _shared_answers(files)
        self._labels = _label_sets(files)
        place, folder = corpus
        names = place.names(folder, ".parquet")
        self._corpus_ids = IdSet(place.read_table(name, ["id"]).column("id").to_pylist() for name in names)
        self._given = GivenTexts(out, shard_rows)
        self._waiting: dict[str, list[dict[str, Any]]] = {}
        self._parts: dict[str, list[str]] = {}
        self._origins: Counter[str] = Counter()
        self._cleaned: Counter[str] = Counter()
        self._rejects: list[dict[str, object]] = []

    def add(self, pairs: list[dict[str, Any]]) -> None:
        """Take some pairs."""
        known = self._corpus_ids.contains([pair["document_id"] for pair in pairs])
        for pair, in_corpus in zip(pairs, known.tolist(), strict=True):
            check_task_type(pair["task_type"], f"pair {pair['id']!r}")
            reason, detail = _reject_reason(pair, in_corpus), pair["document_id"]
            problem = self._swallowed(pair, in_corpus) if reason is None else None
            if problem:
                reason, detail = "instruction_too_long", problem
                self.swallowed_by = self.swallowed_by or problem
            if reason:
                self._rejects.append({"id": pair["id"], "reason": reason, "detail": detail})
                continue
            row = self._row(pair, in_corpus)
            self._origins[row["dataset"]] += 1
            self._given.add(row, inline_id)
            waiting = self._waiting.setdefault(row["collection"], [])
            waiting.append(row)
            if len(waiting) == self._shard_rows:
                self._write(row["collection"])

    def finish(self) -> dict[str, Any]:
        """Write what is left; the counts."""
        for collection in list(self._waiting):
            self._write(collection)
        self._out.write_table(
            f"{REJECTS_FOLDER}/{PART_PATTERN.format(0)}", table_from_rows("rejects", self._rejects)
        )
        return {
            "rows": sum(self._origins.values()),
            "pairs": dict(sorted(self._origins.items())),
            "rejects": dict(sorted(Counter(row["reason"] for row in self._rejects).items())),
            "cleaned": dict(sorted(self._cleaned.items())),
            "parts": self._parts,
            "given": self._given.finish(),
        }

    def _row(self, pair: dict[str, Any], in_corpus: bool) -> dict[str, Any]:
        positive = None if in_corpus else pair["positive"]
        question = question_of(pair["query"], pair["task_type"], pair["instruction"])
        answers = self._answers.get(question, _Answers({pair["document_id"]}))
        right = answers.texts | ({pair["positive"]} if pair["positive"] else set())
        negatives = self._negatives(pair, right)
        if not negatives and pair["task_type"] in LABEL_TASK_TYPES and positive is not None:
            negatives = wrong_labels(self._labels[pair["origin"], pair["instruction"]], right, pair["id"])
        own = positive is not None and not negatives and pair["task_type"] in _PAIRED_TASK_TYPES
        collection = f"{pair['origin']}-{pair['task_type']}" if own else CORPUS
        named = (
            {text: inline_id(text, pair["task_type"], pair["instruction"]) for text in right} if own else {}
        )
        document_id = named.get(positive, pair["document_id"])
        return {
            "id": pair["id"],
            "text": pair["query"],
            "instruction": pair["instruction"],
            "part": "",
            "collection": collection,
            "document_id": document_id,
            "known_positives": sorted(named.values() if own else answers.documents),
            "positive": positive,
            "negatives": negatives or None,
            "task_type": pair["task_type"],
            "dataset": pair["dataset"] or pair["origin"],
            "rights": sorted(right - {positive}) or None,
        }

    def _swallowed(self, pair: dict[str, Any], in_corpus: bool) -> str | None:
        """Why a teacher would see next to nothing of a pair's query, or of a text given with it, if so."""
        if self._too_long is None:
            return None
        task_type, instruction = pair["task_type"], pair["instruction"]
        sides: list[tuple[str, Side]] = [(pair["query"], "query")]
        if is_instructed("document", opposite_task_type(task_type)):
            given = [None if in_corpus else pair["positive"], *(pair["negatives"] or [])]
            sides += [(text, "document") for text in given if text]
        found = (self._too_long(text, side, task_type, instruction) for text, side in sides)
        return next((problem for problem in found if problem), None)

    def _negatives(self, pair: dict[str, Any], right: set[str]) -> list[str]:
        """The negatives that came with a pair, less those that are none."""
        wrong = {folded(text): "negative_is_positive" for text in right}
        if pair["task_type"] not in LABEL_TASK_TYPES:
            wrong.setdefault(folded(pair["query"]), "negative_is_query")
        given = pair["negatives"] or []
        reasons = [wrong.get(folded(text)) for text in given]
        self._cleaned.update(reason for reason in reasons if reason is not None)
        return [text for text, reason in zip(given, reasons, strict=True) if reason is None]

    def _write(self, collection: str) -> None:
        rows = self._waiting.pop(collection)
        name = PART_PATTERN.format(sum(len(names) for names in self._parts.values()))
        self._parts.setdefault(collection, []).append(name)
        table = pa.Table.from_pylist([{**row, "part": name} for row in rows], schema=QUERY_SCHEMA)
        self._out.write_table(f"{QUERIES_FOLDER}/{name}", table)


def _reject_reason(pair: dict[str, Any], in_corpus: bool) -> str | None:
    if not pair["query"].strip():
        return "empty_query"
    if in_corpus:
        return None
    if pair["positive"] is None:
        return "positive_not_in_corpus"
    return None if pair["positive"].strip() else "empty_positive"


def _in_parts(files: list[_Source], rows: int) -> Iterator[pa.Table]:
    for place, name in files:
        table = check_table("pairs", place.read_table(name), f"{place.uri}/{name}")
        for start in range(0, table.num_rows, rows):
            yield table.slice(start, rows)


def _rows(files: list[_Source], names: list[str]) -> Iterator[tuple[Any, ...]]:
    for place, name in files:
        table = check_table("pairs", place.read_table(name), f"{place.uri}/{name}")
        yield from zip(*(table.column(column).to_pylist() for column in names), strict=True)


def _repeated(values: Callable[[], Iterator[str]]) -> set[int]:
    """Digests that stand more than once; eight bytes a value while counting."""
    digests = hashes64(values())
    digests.sort()
    return {int(digest) for digest in np.unique(digests[1:][digests[1:] == digests[:-1]])}


def _check_ids(files: list[_Source]) -> None:
    suspects = _repeated(lambda: (row[0] for row in _rows(files, ["id"])))
    counts = (
        Counter(row[0] for row in _rows(files, ["id"]) if hash64(row[0]) in suspects)
        if suspects
        else Counter()
    )
    for identifier, count in counts.items():
        if count > 1:
            raise DataError(
                f"mining: pair id {identifier!r} stands {count} times in the pairs to mine; ids must be unique"
            )


def _shared_answers(files: list[_Source]) -> dict[str, _Answers]:
    """The right answers to every question that stands in several pairs."""
    names = ["query", "task_type", "instruction"]
    repeated = _repeated(lambda: (question_of(*row) for row in _rows(files, names)))
    found: dict[str, _Answers] = {}
    for *asked, document_id, positive in (
        _rows(files, [*names, "document_id", "positive"]) if repeated else ()
    ):
        question = question_of(*asked)
        if hash64(question) in repeated:
            answers = found.setdefault(question, _Answers())
            answers.documents.add(document_id)
            if positive:
                answers.texts.add(positive)
    return found


def _label_sets(files: list[_Source]) -> dict[tuple[str, str], list[str]]:
    """All labels of each classification task, which its dataset and instruction name."""
    found: dict[tuple[str, str], set[str]] = {}
    for task_type, origin, instruction, positive, negatives in _rows(
        files, ["task_type", "origin", "instruction", "positive", "negatives"]
    ):
        if task_type in LABEL_TASK_TYPES and positive:
            found.setdefault((origin, instruction), set()).update([positive, *(negatives or [])])
    return {task: sorted(labels) for task, labels in found.items()}
