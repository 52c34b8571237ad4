"""The attempts of one round, written as tables: which document, pair or task each of them reads.

Runs in a Ray task. Everything follows from the round's plan and the run's seed, so a killed writing is done again
with the same result; ``attempts.json`` stands last.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedloom.config.families import FamilyConfig
from embedloom.instructions import document_text
from embedloom.ngrams import hash64
from embedloom.storage import Place
from embedloom.synthesis.attempts import attempt_row, attempt_table, weighted
from embedloom.synthesis.families.registry import FAMILIES
from embedloom.synthesis.quotas import Cell
from embedloom.synthesis.selection import RowSource, chosen_rows, fill_positives, ordered_ranks
from embedloom.synthesis.task_choice import TaskChoice

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
    for chunk in _chunks(chosen_rows(rows, orders, wanted, seed)):
        if kind == "pair":
            fill_positives([row for _, _, row in chunk], work.documents, document_text)
        for label, index, row in chunk:
            cell, ordinal, other = asked.attempt(label, index)
            writer.add(_row(work, cell, ordinal, other, **{kind: row}))
    return complete


def _chunks(found: Iterator[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for one in found:
        chunk.append(one)
        if len(chunk) == _ROWS_PER_FILE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
