"""The attempts of a round: one row per request of a family to a generator, with the document, pair or task that it reads."""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.config.synthesis import FamilyConfig
from embedloom.core.prompting import document_text
from embedloom.core.schemas import check_table, content_id
from embedloom.core.storage import Place
from embedloom.core.text import hash64, hashes64
from embedloom.core.text_table import TextTable
from embedloom.errors import DataError, StageError
from embedloom.synthesis.families.base import Attempt, SeedDocument
from embedloom.synthesis.families.registry import FAMILIES
from embedloom.synthesis.quotas import Cell

# Attempts as rows of a table: what a shard of work holds, one row per request of a family to a generator.


ATTEMPT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("family", pa.string()),
        ("generator", pa.string()),
        ("ordinal", pa.int64()),
        ("language", pa.string()),
        ("document_language", pa.string()),
        ("seed", pa.uint64()),
        ("document_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("lang", pa.string()),
        ("task", pa.string()),
        ("pair", pa.string()),  # JSON of a row of the pairs schema
    ]
)
DEFAULT_LANG = "eng"  # of a document whose corpus does not say


def attempt_row(
    *,
    seed: int,
    family: str,
    generator: str,
    ordinal: int,
    language: str,
    document_language: str,
    prompt_hash: str,
    document: Mapping[str, Any] | None = None,
    task: str | None = None,
    pair: Mapping[str, Any] | None = None,
) -> dict[str, object]:
    """A row of ATTEMPT_SCHEMA; its id says everything that decides what is asked, its seed everything drawn.

    Args:
        seed: of the run.
        family: key of its section, or of the task list.
        generator: the LLM; empty where none is asked.
        ordinal: number within its cell.
        language: of the query.
        document_language: of the other side.
        prompt_hash: of the prompt; empty where none is used.
        document: a row of the documents schema.
        task: a brainstormed sentence.
        pair: a row of the pairs schema.
    """
    source = str((document or pair or {}).get("id", task or ""))
    identity = content_id(
        "attempt",
        str(seed),
        family,
        generator,
        language,
        document_language,
        str(ordinal),
        prompt_hash,
        source,
    )
    return {
        "id": identity,
        "family": family,
        "generator": generator,
        "ordinal": ordinal,
        "language": language,
        "document_language": document_language,
        "seed": hash64(f"{seed}:{identity}"),
        "document_id": document["id"] if document else None,
        "title": document["title"] if document else None,
        "text": document["text"] if document else None,
        "lang": (document["lang"] or DEFAULT_LANG) if document else None,
        "task": task,
        "pair": None if pair is None else json.dumps(pair, ensure_ascii=False),
    }


def attempt_table(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Rows of ``attempt_row`` as a table."""
    return pa.Table.from_pylist(list(rows), schema=ATTEMPT_SCHEMA)


def read_attempts(table: pa.Table) -> list[Attempt]:
    """The attempts of a table; other columns do not matter."""
    return [
        Attempt(
            id=row["id"],
            family=row["family"],
            generator=row["generator"],
            ordinal=row["ordinal"],
            language=row["language"],
            document_language=row["document_language"],
            seed=row["seed"],
            document=None
            if row["document_id"] is None
            else SeedDocument(row["document_id"], row["title"], row["text"], row["lang"]),
            task=row["task"],
            pair=None if row["pair"] is None else json.loads(row["pair"]),
        )
        for row in table.select(ATTEMPT_SCHEMA.names).to_pylist()
    ]


def weighted(weights: Mapping[str, float], number: int) -> str:
    """The key that a 64-bit number falls on when the keys share the numbers out by weight."""
    point = number / 2**64 * sum(weights.values())
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return next(reversed(list(weights)))


# Which documents or pairs the attempts read: decided by hash, streamed, eight bytes a row in memory.
#
# The rows that may serve a label (a document language; for translation, a target language) are ordered by a hash.
# Attempts take the next places of that order, from round to round, and start over when it is used up; so every
# generator reads other documents, no row is drawn at random twice, and where an attempt reads follows from the plan.


Numbers = np.ndarray[Any, np.dtype[np.int64]]
_ROWS = 4096  # read at a time


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where seed rows come from: files of one kind of table, and which of them may serve a label."""

    kind: str  # documents or pairs
    files: tuple[tuple[Place, str], ...]
    # Documents serve their own language; a pair is translated into every language but its own.
    same_language: bool

    def serves(self, lang: str | None, label: str) -> bool:
        """Whether a row of this language may be read for the label."""
        return ((lang or DEFAULT_LANG) == label) == self.same_language

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The rows, some thousand at a time.

        Raises:
            DataError: a file lacks a needed column.
        """
        for place, name in self.files:
            schema, _ = place.parquet_footer(name)
            wanted = columns or schema.names
            missing = [column for column in wanted if column not in schema.names]
            if missing and missing != ["lang"]:
                check_table(self.kind, place.read_table(name), f"{place.uri}/{name}")
            for table in place.iter_tables(name, [c for c in wanted if c in schema.names], _ROWS):
                yield table if columns else check_table(self.kind, table, f"{place.uri}/{name}")


def hash_ranks(seed: str, ids: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit number per id, ``uint64 [len(ids)]``, that depends on nothing but the seed and the id."""
    return hashes64(f"{seed}:{one}" for one in ids)


def ordered_ranks(source: RowSource, labels: Sequence[str], seed: str, where: str) -> dict[str, Any]:
    """Per label the sorted hashes of the rows that may serve it, ``uint64``.

    Args:
        source: the rows.
        labels: languages.
        seed: fixes the order.
        where: config key, named in errors.

    Raises:
        DataError: no row at all, or none for a label.
    """
    found: dict[str, list[Any]] = {label: [] for label in labels}
    seen: set[str] = set()
    for table in source.tables(["id", "lang"]):
        langs = table.column("lang").to_pylist() if "lang" in table.column_names else [None] * table.num_rows
        seen.update(lang or DEFAULT_LANG for lang in langs)
        ranks = hash_ranks(seed, table.column("id").to_pylist())
        for label in labels:
            fits = np.array([source.serves(lang, label) for lang in langs], dtype=bool)
            found[label].append(ranks[fits])
    for label, parts in found.items():
        if not any(len(part) for part in parts):
            need = f"in {label!r}" if source.same_language else f"in another language than {label!r}"
            raise DataError(
                f"{where}: the corpus has no {source.kind} {need}; its languages: {', '.join(sorted(seen)) or 'none'}"
            )
    return {label: np.sort(np.concatenate(parts)) for label, parts in found.items()}


def chosen_rows(
    source: RowSource,
    orders: dict[str, Any],
    wanted: dict[str, Numbers],
    seed: str,
    columns: Sequence[str] | None = None,
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every wanted row as (label, index into ``wanted[label]``, row), in the order of the files.

    Args:
        source: the rows.
        orders: of ``ordered_ranks``.
        wanted: per label, places in its order, each below the number of its rows; a place may stand several times.
        seed: as for ``ordered_ranks``.
        columns: of the rows; None: all, checked.
    """
    by_place = {label: np.argsort(places, kind="stable") for label, places in wanted.items()}
    for table in source.tables(columns):
        rows: list[dict[str, Any]] | None = None
        ranks = hash_ranks(seed, table.column("id").to_pylist())
        langs = table.column("lang").to_pylist() if "lang" in table.column_names else [None] * table.num_rows
        for label, order in orders.items():
            fits = np.array([source.serves(lang, label) for lang in langs], dtype=bool)
            places = np.searchsorted(order, ranks)
            sorted_places = wanted[label][by_place[label]]
            first = np.searchsorted(sorted_places, places, side="left")
            last = np.searchsorted(sorted_places, places, side="right")
            for number in np.flatnonzero(fits & (last > first)):
                rows = table.to_pylist() if rows is None else rows
                for index in by_place[label][first[number] : last[number]]:
                    yield label, int(index), rows[number]


class PositiveTexts:
    """The texts of the documents that chosen pairs name and do not bring, out of one pass over the corpus, on this machine's disk."""

    def __init__(
        self,
        pairs: RowSource,
        orders: dict[str, Any],
        wanted: dict[str, Numbers],
        seed: str,
        documents: RowSource,
    ) -> None:
        """Find them; eight bytes a pair in memory.

        Args:
            pairs: where pairs come from.
            orders: of ``ordered_ranks``.
            wanted: see ``chosen_rows``.
            seed: as for ``ordered_ranks``.
            documents: of the corpus.
        """
        columns = ["id", "lang", "document_id", "positive"]
        chosen = chosen_rows(pairs, orders, wanted, seed, columns)
        needed = np.unique(hashes64(row["document_id"] for _, _, row in chosen if row["positive"] is None))
        self._folder = tempfile.TemporaryDirectory(prefix="embedloom-positives-")
        found = _texts_of(documents, needed) if len(needed) else ()
        self._texts = TextTable.build(Path(self._folder.name), found)

    def fill(self, rows: Sequence[dict[str, Any]]) -> None:
        """Give pairs without a positive the text of their document, in place.

        Raises:
            DataError: a pair whose document the corpus lacks.
        """
        for row in rows:
            if row["positive"] is None:
                row["positive"] = self._texts.get(row["document_id"])
            if row["positive"] is None:
                raise DataError(
                    f"pair {row['id']!r}: its document {row['document_id']!r} is not in the train split, and it has no positive"
                )

    def close(self) -> None:
        """Delete them."""
        self._folder.cleanup()


def _texts_of(documents: RowSource, needed: Any) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents with one of these digests of their ids, which ascend."""
    for table in documents.tables():
        hits = np.isin(hashes64(table.column("id").to_pylist()), needed)
        for row in table.filter(pa.array(hits)).to_pylist():
            yield row["id"], document_text(row["title"], row["text"])


# Which brainstormed task an attempt is written for: another generator's, for the stated share of the rows.


@dataclass(frozen=True, slots=True)
class Task:
    """A brainstormed sentence and who wrote it."""

    id: str
    generator: str
    text: str


def picks_other(ordinal: int, share: float) -> bool:
    """Whether this ordinal's task is another generator's: exactly ``share`` of any long stretch, evenly spread."""
    return math.floor((ordinal + 1) * share) > math.floor(ordinal * share)


class TaskChoice:
    """Draws the tasks of one cell by hash; where one side has no task, the other side's are drawn from."""

    def __init__(self, tasks: Sequence[Task], cell: Cell, cross_model: float, seed: int) -> None:
        ordered = sorted(tasks, key=lambda task: task.id)
        self._others = [task for task in ordered if task.generator != cell.generator]
        self._own = [task for task in ordered if task.generator == cell.generator]
        if not ordered:
            raise StageError(f"synthesize: no task was brainstormed for family {cell.family}")
        self._cell = cell
        self._share = cross_model
        self._seed = seed

    @classmethod
    def read(cls, place: Place, folder: str, cell: Cell, cross_model: float, seed: int) -> "TaskChoice":
        """The tasks of the cell's family in a folder."""
        tasks = [
            Task(row["id"], row["generator"], row["text"])
            for name in place.names(folder, ".parquet")
            for row in place.read_table(name).to_pylist()
            if row["family"] == cell.family
        ]
        return cls(tasks, cell, cross_model, seed)

    def pick(self, ordinal: int) -> Task:
        """The task of an attempt."""
        chosen = self._others or self._own if picks_other(ordinal, self._share) else self._own or self._others
        return chosen[hash64(f"{self._seed}:{self._cell.name}:{ordinal}:task") % len(chosen)]


# The attempts of one round, written as tables: which document, pair or task each of them reads.
#
# Runs in a Ray task. Everything follows from the round's plan and the run's seed, so a killed writing is done again
# with the same result; ``attempts.json`` stands last.


ATTEMPTS_FILE = "attempts.json"
EXTRACTED = "extracted"  # folder of attempts that no generator is asked
_ROWS_PER_FILE = 4096


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive ordinals of a cell: what a round asks of it."""

    cell: Cell
    start: int
    stop: int


@dataclass(frozen=True)
class RoundWork:
    """All that decides the attempts of a round.

    Attributes:
        seed: of the run.
        stretches: what is asked of each cell.
        families: section per family key.
        prompt_hashes: per generator, per family key.
        generators: in order; attempts of number n go to ``attempts/<n>``.
        place: of the artefact.
        folder: of the round, below it.
        documents: what families read that start from documents.
        pairs: what a family reads that starts from pairs, by family key.
        tasks: folder of the brainstormed tasks; empty in step one, where they are what is asked for.
        cross_model: share of the rows whose task comes from another generator.
        offsets: per family and label, places used in earlier rounds.
    """

    seed: int
    stretches: tuple[Stretch, ...]
    families: Mapping[str, FamilyConfig]
    prompt_hashes: Mapping[str, Mapping[str, str]]
    generators: tuple[str, ...]
    place: Place
    folder: str
    documents: RowSource
    pairs: Mapping[str, RowSource] = field(default_factory=dict)
    tasks: str = ""
    cross_model: float = 1.0
    offsets: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def attempts_folder(round_folder: str, generators: tuple[str, ...], generator: str) -> str:
    """Where a generator's attempts of a round stand."""
    return f"{round_folder}/attempts/{generators.index(generator) if generator else EXTRACTED}"


def write_attempts(work: RoundWork) -> dict[str, Any]:
    """Write ``attempts/`` and ``attempts.json`` of a round.

    Returns:
        ``{"attempts": {generator: n}, "offsets": {family: {label: n}}, "exhausted": [family, ...]}``; exhausted are
        families whose documents have all been read and are not worth reading again.

    Raises:
        DataError: no document or pair in a language that is asked for.
    """
    writer = _Writer(work)
    offsets: dict[str, dict[str, int]] = {key: dict(used) for key, used in work.offsets.items()}
    exhausted: list[str] = []
    for key, options in work.families.items():
        stretches = [one for one in work.stretches if one.cell.family == key]
        if not stretches:
            continue
        rows = source_of(work, key, options)
        if rows is None:
            for stretch in stretches:
                for row in _unsourced(work, options, stretch):
                    writer.add(row)
            continue
        done = _sourced(work, options, rows, stretches, offsets.setdefault(key, {}), writer)
        if not done:
            exhausted.append(key)
    writer.flush()
    summary = {"attempts": writer.counts, "offsets": offsets, "exhausted": exhausted}
    work.place.write_json(f"{work.folder}/{ATTEMPTS_FILE}", summary)
    return summary


def source_of(work: RoundWork, key: str, options: FamilyConfig) -> RowSource | None:
    """The rows a family starts from, if any."""
    family = FAMILIES[options.family]
    if family.source == "documents":
        return work.documents
    return work.pairs[key] if family.source == "pairs" else None


def ordinal_language(work: RoundWork, options: FamilyConfig, cell: Cell, ordinal: int) -> str:
    """Language of the text on the query's other side: the query's own, or drawn by weight."""
    weights = options.document_weights(cell.language)
    if len(weights) == 1:
        return next(iter(weights))
    return weighted(weights, hash64(f"{work.seed}:{cell.name}:{ordinal}:document_language"))


class _Writer:
    """Collects attempts per generator and writes a file whenever one is full."""

    def __init__(self, work: RoundWork) -> None:
        self._work = work
        self._waiting: dict[str, list[dict[str, object]]] = {}
        self._files: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def add(self, row: dict[str, object]) -> None:
        generator = str(row["generator"])
        waiting = self._waiting.setdefault(generator, [])
        waiting.append(row)
        if len(waiting) == _ROWS_PER_FILE:
            self._write(generator)

    def flush(self) -> None:
        for generator in list(self._waiting):
            self._write(generator)

    def _write(self, generator: str) -> None:
        rows = self._waiting.pop(generator)
        number = self._files.get(generator, 0)
        folder = attempts_folder(self._work.folder, self._work.generators, generator)
        self._work.place.write_table(f"{folder}/part-{number:06d}.parquet", attempt_table(rows))
        self._files[generator] = number + 1
        self.counts[generator] = self.counts.get(generator, 0) + len(rows)


def _row(work: RoundWork, cell: Cell, ordinal: int, other: str, **source: Any) -> dict[str, object]:
    return attempt_row(
        seed=work.seed, family=cell.family, generator=cell.generator, ordinal=ordinal, language=cell.language,
        document_language=other, prompt_hash=work.prompt_hashes.get(cell.generator, {}).get(cell.family, ""), **source,
    )  # fmt: skip


def _unsourced(work: RoundWork, options: FamilyConfig, stretch: Stretch) -> Iterator[dict[str, object]]:
    """Attempts that read nothing, or a task."""
    cell = stretch.cell
    choice = None
    if work.tasks and FAMILIES[options.family].source == "tasks":
        choice = TaskChoice.read(work.place, work.tasks, cell, work.cross_model, work.seed)
    for ordinal in range(stretch.start, stretch.stop):
        source = {} if choice is None else {"task": choice.pick(ordinal).text}
        yield _row(work, cell, ordinal, ordinal_language(work, options, cell, ordinal), **source)


class _Asked:
    """The attempts of a family as arrays, a few bytes each: whose they are, and what rows may serve them."""

    def __init__(
        self, work: RoundWork, options: FamilyConfig, rows: RowSource, stretches: list[Stretch]
    ) -> None:
        self._stretches = stretches
        self._languages = sorted(
            {one.cell.language for one in stretches} | set(options.document_languages or {})
        )
        lengths = [one.stop - one.start for one in stretches]
        self._owners = np.repeat(np.arange(len(stretches)), lengths)
        self._ordinals = np.concatenate([np.arange(one.start, one.stop) for one in stretches])
        own = np.repeat([self._languages.index(one.cell.language) for one in stretches], lengths)
        self._others = own
        if options.document_languages is not None:
            drawn = (
                ordinal_language(work, options, stretches[owner].cell, int(ordinal))
                for owner, ordinal in zip(self._owners, self._ordinals, strict=True)
            )
            self._others = np.fromiter((self._languages.index(one) for one in drawn), np.int16, len(own))
        served = self._others if rows.same_language else own
        self.by_label = {self._languages[code]: np.flatnonzero(served == code) for code in np.unique(served)}

    def attempt(self, label: str, index: int) -> tuple[Cell, int, str]:
        """(cell, ordinal, document language) of an attempt by its number among those of a label."""
        number = self.by_label[label][index]
        cell = self._stretches[int(self._owners[number])].cell
        return cell, int(self._ordinals[number]), self._languages[int(self._others[number])]


def _sourced(
    work: RoundWork,
    options: FamilyConfig,
    rows: RowSource,
    stretches: list[Stretch],
    used: dict[str, int],
    writer: _Writer,
) -> bool:
    """Attempts that read a document or pair each; False if an extracting family has read them all."""
    asked = _Asked(work, options, rows, stretches)
    seed = f"{work.seed}:{options.key}"
    orders = ordered_ranks(rows, list(asked.by_label), seed, f"synthesis.families.{options.key}")
    wanted: dict[str, Any] = {}
    complete = True
    for label, order in orders.items():
        places = used.get(label, 0) + np.arange(len(asked.by_label[label]))
        used[label] = used.get(label, 0) + len(places)
        if FAMILIES[options.family].extracts:  # the same document would give the same rows again
            complete &= used[label] <= len(order)
            places = places[places < len(order)]
        wanted[label] = places % len(order)
    kind = "document" if rows.kind == "documents" else "pair"
    texts = PositiveTexts(rows, orders, wanted, seed, work.documents) if kind == "pair" else None
    for label, index, row in chosen_rows(rows, orders, wanted, seed):
        if texts is not None:
            texts.fill([row])
        cell, ordinal, other = asked.attempt(label, index)
        writer.add(_row(work, cell, ordinal, other, **{kind: row}))
    if texts is not None:
        texts.close()
    return complete
