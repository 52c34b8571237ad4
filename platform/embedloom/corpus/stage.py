"""The corpus stage: read, clean, deduplicate, split by group, cut into chunks, write; in tasks that pass rows on in files.

The driver plans, counts and holds no row. Each step is a task for every piece of the sources, range of ids or bucket of
hashes (``exchange``): clean → sort into ranges by id → exact duplicates → bands → near-duplicates → settle → drop → questions
→ cut → parts. A step's files outlive the process, so a build that was killed goes on behind the last finished task.
Everything is a function of the sources, the config and the seed; neither pieces and ranges nor who works on them show.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from embedloom.compute.shards import Tasks, plan_shards, run_here, run_tasks
from embedloom.config.corpus import CorpusConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter, code_versions
from embedloom.core.progress import Progress, note
from embedloom.core.storage import Place, located
from embedloom.corpus import cutting, dedup, questions, reading
from embedloom.corpus.cutting import CUT_FOLDER, PART_ROWS, chunker_of
from embedloom.corpus.exchange import Counts, Runner
from embedloom.corpus.questions import SPLITS
from embedloom.corpus.reading import Sizes, Work
from embedloom.corpus.sources import UNREADABLE, Piece, check_unreadable, no_document, pieces_of
from embedloom.encoder.registry import NodeModel
from embedloom.errors import DataError

STEPS_FOLDER = "steps"
_PLAN_FILE = "plan.json"
_FOLDERS = ("documents", "pairs", "chunks", "rejects")
# Sources of fewer bytes are taken in this process, their steps in memory: a worker's start alone takes longer.
_SMALL_BYTES = 16 * 2**20
# Formats whose size no file tells: what installed packages document is small, a data set of the hub is not.
_UNKNOWN_BYTES = {"python_docs": 0, "huggingface": _SMALL_BYTES}
PLAIN = Sizes()


def build_corpus(
    config: CorpusConfig,
    seed: int,
    tokenizer: Path | NodeModel,
    out: ArtefactWriter,
    tasks: Tasks = run_here,
    sizes: Sizes = PLAIN,
) -> Artefact:
    """Build the corpus artefact: documents and natural pairs by split, and the rejects.

    Args:
        config: the corpus section.
        seed: the run's seed; decides which groups are held out.
        tokenizer: model whose tokenizer measures chunks.
        out: writer of a ``corpus`` artefact.
        tasks: runs a function over many items, in order; what is small is done here all the same.
        sizes: how much one task takes.

    Raises:
        DataError: an unreadable source, ids that repeat, nothing left after cleaning, or nothing to train on.
    """
    for folder in _FOLDERS:  # an interrupted build may have left parts of its own
        out.place.child(folder).remove()
    if config.chunk_tokens is not None:
        # Before the reading, which takes minutes: a folder without a tokenizer should say so at once.
        chunker_of(tokenizer, config.chunk_tokens, config.chunk_overlap_tokens)
    pieces = [pieces_of(source, sizes.piece_bytes) for source in config.sources]
    if sum(map(_bytes_of, (piece for own in pieces for piece in own))) < _SMALL_BYTES:
        place = Place(f"memory://embedloom-corpus-{uuid4().hex}")
        runner = Runner(place, run_here, resumable=False)
    else:
        place = _steps(out.place.absolute().child(STEPS_FOLDER), sizes)
        runner = Runner(place, tasks, resumable=True)
    try:
        build = _Build(runner, Work(place, config, seed, sizes), tokenizer, out)
        counts = build.all(pieces)
        return out.commit(counts, scratch=[STEPS_FOLDER] if runner.resumable else ())
    finally:
        if not runner.resumable:
            place.remove()


def _bytes_of(piece: Piece) -> int:
    if not piece.files:
        path = located(piece.source.path or "") / "corpus.jsonl"
        unknown = _UNKNOWN_BYTES.get(piece.source.format, 0)
        return path.stat().st_size if path.is_file() else unknown
    return sum(path.stat().st_size for path, _ in piece.files)


def _steps(place: Place, sizes: Sizes) -> Place:
    """The steps' folder, empty unless this very code began there with these sizes."""
    plan = {"code": code_versions()["code"], "sizes": str(sizes)}
    if not place.exists(_PLAN_FILE) or place.read_json(_PLAN_FILE) != plan:
        place.remove()
        place.write_json(_PLAN_FILE, plan)
    return place


@dataclass(slots=True)
class _Build:
    """One build: its steps in order, and what they count."""

    runner: Runner
    work: Work
    model: Path | NodeModel
    out: ArtefactWriter
    rejects: Counter[str] = field(default_factory=Counter)
    reject_files: list[tuple[str, int]] = field(default_factory=list)  # in order: name, rows
    numbers: Counter[str] = field(default_factory=Counter)

    def all(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Every step; the counts of the artefact."""
        blocks = self._read(pieces)
        self._note_rejects_of_reading(sum(map(len, pieces)))
        ranges = self._sort(blocks) if blocks else 0
        dropped = self._duplicates(
            ranges, sum(block["rows"] for block in blocks), any(b["queries"] for b in blocks)
        )
        groups = self._groups(dropped)
        cut = self._cut(ranges, sum(block["queries"] for block in blocks))
        rows = Counter[str]()
        for one in cut:
            rows.update(one["rows"])
        self._write([one["rows"] for one in cut])
        return self._counts(rows, groups)

    def _step(
        self, name: str, function: Callable[..., Counts], items: int | Sequence[Any], *shared: Any
    ) -> list[Counts]:
        """One step of tasks, over ranges or buckets by their number alone or over items of its own."""
        listed = [None] * items if isinstance(items, int) else items
        return list(self.runner.run(name, function, listed, self.work, *shared))

    def _forget(self, *folders: str) -> None:
        """Delete what the step before was the last to read."""
        for folder in folders:
            self.work.place.child(folder).remove()

    # Reading.

    def _read(self, pieces: Sequence[Sequence[Piece]]) -> list[Counts]:
        """Clean the rows of all sources; what is said of every block of them."""
        progress = Progress("corpus", None, "documents read")
        blocks: list[Counts] = []
        first = 0
        for source, own in enumerate(pieces):
            numbered = list(enumerate(own, start=first))
            first += len(own)
            read, before = 0, self.rejects[UNREADABLE]
            for counts in self._read_source(source, [(piece, number) for number, piece in numbered]):
                read += counts["read"]
                blocks += counts["blocks"]
                self.rejects.update(counts["rejects"])
                progress.advance(counts["read"])
            check_unreadable(own[0].source, self.rejects[UNREADABLE] - before, read)
            if read == 0:
                raise no_document(own[0].source)
        self.numbers["read"] = progress.done
        kept = sum(block["rows"] for block in blocks)
        note("corpus", f"{progress.done:,} documents read, {kept:,} after cleaning")
        return blocks

    def _read_source(self, source: int, pieces: Sequence[tuple[Piece, int]]) -> Iterator[Counts]:
        """Rows of pairs first meet those of the same text: a document has all queries that it answers."""
        where = (
            reading.where_to_read([piece for piece, _ in pieces]) if self.runner.tasks is run_tasks else {}
        )
        if pieces[0][0].source.query_column is None:
            yield from self.runner.run(f"clean-{source}", reading.clean_piece, pieces, self.work, **where)
            return
        buckets = max(1, sum(_bytes_of(piece) for piece, _ in pieces) // self.work.sizes.piece_bytes)
        gathered = self.runner.run(
            f"gather-{source}", reading.gather_pairs, pieces, self.work, source, buckets, **where
        )
        for counts in gathered:
            self.rejects.update(counts["rejects"])
        yield from self._step(f"merge-{source}", reading.merge_pairs, [pieces[0][0]] * buckets, source)

    def _note_rejects_of_reading(self, pieces: int) -> None:
        for reason in ("judged_document_missing", "judged_query_missing"):
            if count := self.rejects[reason]:
                text = (
                    f"{count:,} rejects of reason {reason}: train judgements of what the source does not hold"
                )
                note("corpus", text)
        if self.rejects.total():
            self._ordered(reading.READ_REJECTS, pieces)

    def _ordered(self, folder: str, receivers: int) -> None:
        rows = self._step(folder, cutting.order_rejects, receivers, folder)
        self._keep_rejects(f"{CUT_FOLDER}/{folder}", [one["rows"] for one in rows])

    def _keep_rejects(self, folder: str, rows: Sequence[int]) -> None:
        self.reject_files += [
            (f"{folder}/{number:06d}.arrow", count) for number, count in enumerate(rows) if count
        ]

    def _sort(self, blocks: Sequence[Counts]) -> int:
        """Put all rows in id order; returns the number of ranges."""
        sizes = self.work.sizes
        bounds = reading.range_bounds(blocks, sizes)
        plain = [{"name": block["name"]} for block in blocks]
        self._step("ranges", reading.cut_ranges, plain, bounds)
        buckets = sizes.buckets(sum(block["rows"] for block in blocks))
        self._step("sort", reading.sort_range, len(bounds) + 1, buckets)
        self._forget(reading.ROWS_FOLDER, reading.RANGES_FOLDER)
        self._step("exact", dedup.find_exact, buckets)
        return len(bounds) + 1

    # Duplicates.

    def _duplicates(self, ranges: int, rows: int, asked: bool) -> list[Counts]:
        """Find and drop exact and near-duplicates; what each range says of it."""
        sizes = self.work.sizes
        bands = dedup.bands_of_a_document(self.work.config.near_duplicate_threshold)
        buckets = sizes.buckets(rows * bands)
        self._step("bands", dedup.send_bands, ranges, buckets)
        if bands and ranges:
            proposed = self._step("propose", dedup.propose_pairs, buckets)
            self._forget(dedup.BANDS_FOLDER)
            self._note_crowded(sum(one["crowded"] for one in proposed))
            if any(one["pairs"] for one in proposed):
                self._step("shingles", dedup.send_shingles, ranges)
                self._step("verify", dedup.verify_pairs, ranges)
                self._step("near", dedup.choose_near, 1)
        self._step("settle", questions.settle, ranges)
        dropped = self._step("drop", questions.drop_duplicates, ranges, sizes.buckets(rows), asked)
        for reason, folder in (
            ("duplicate", questions.DUPLICATE_REJECTS), ("near_duplicate", questions.NEAR_REJECTS)
        ):  # fmt: skip
            self.rejects[reason] += sum(one[reason] for one in dropped)
            self._keep_rejects(folder, [one[reason] for one in dropped])
        if not sum(one["kept"] for one in dropped):
            raise DataError(
                f"corpus: no document is left of {self.numbers['read']} read; rejects: {self._rejected()}; "
                f"corpus.min_characters is {self.work.config.min_characters}"
            )
        return dropped

    def _note_crowded(self, keys: int) -> None:
        self.numbers["crowded"] = keys
        if keys:
            most = dedup.MOST_IN_A_BAND
            text = f"{keys:,} keys of near-duplicates are shared by more than {most} documents, each held against the first {most}"
            note("corpus", text)

    def _groups(self, dropped: Sequence[Counts]) -> dict[str, int]:
        """How many groups fall to each split.

        Raises:
            DataError: no group falls to train.
        """
        split = self.work.config.split
        buckets = self.work.sizes.buckets(
            sum(one["kept"] + one["duplicate"] + one["near_duplicate"] for one in dropped)
        )
        counted = self._step("groups", questions.count_groups, buckets)
        groups = {name: sum(one[name] for one in counted) for name in SPLITS}
        total = sum(groups.values())
        if not groups["train"]:
            raise DataError(
                f"corpus.split: none of the {total} groups falls to train (dev {split.dev:g}, "
                f"test {split.test:g}, seed {self.work.seed}); give more documents, smaller shares or another run.seed"
            )
        for name, share in {"dev": split.dev, "test": split.test}.items():
            if share > 0 and not groups[name]:
                note(
                    "corpus",
                    f"the {name} split is empty: none of the {total} groups falls to its share {share:g}",
                )
        return groups

    # Writing.

    def _cut(self, ranges: int, asked: int) -> list[Counts]:
        """Gather the questions of the documents that stay, and cut these."""
        if asked:
            buckets = self.work.sizes.buckets(asked)
            gathered = self._step("questions", questions.gather_questions, ranges, buckets)
            self._step("one-split", questions.keep_in_one_split, buckets)
            if repeated := sum(one["duplicate_query"] for one in gathered):
                self.rejects["duplicate_query"] += repeated
                self._ordered(questions.QUERY_REJECTS, ranges)
        progress = Progress("corpus", ranges, "ranges cut into documents")
        found = []
        for counts in self.runner.run("cut", cutting.cut_range, [None] * ranges, self.work, self.model):
            found.append(counts)
            progress.advance(1)
        for name in ("moved", "tokens"):
            self.numbers[name] = sum(one.get(name, 0) for one in found)
        self.rejects["query_in_other_split"] += sum(one["query_in_other_split"] for one in found)
        self._keep_rejects(questions.SPLIT_REJECTS, [one["query_in_other_split"] for one in found])
        return found

    def _write(self, ranges: Sequence[dict[str, int]]) -> None:
        """Gather the rows of all ranges in the artefact's parts."""
        kinds = {f"{kind}/{split}": kind for kind in ("documents", "pairs") for split in SPLITS} | {
            "chunks": "chunks"
        }
        files = {
            folder: [(f"{CUT_FOLDER}/{folder}/{n:06d}.arrow", rows[folder]) for n, rows in enumerate(ranges) if rows[folder]]
            for folder in kinds
        } | {"rejects": self.reject_files}  # fmt: skip
        for folder, kind in (kinds | {"rejects": "rejects"}).items():
            parts = [(folder, shard) for shard in plan_shards(files[folder], PART_ROWS)]
            self._step(
                f"write-{folder.replace('/', '-')}",
                cutting.write_part,
                parts,
                kind,
                self.out.place.absolute(),
            )

    def _rejected(self) -> dict[str, int]:
        return {reason: count for reason, count in sorted(self.rejects.items()) if count}

    def _counts(self, rows: Counter[str], groups: dict[str, int]) -> dict[str, Any]:
        by_split = {split: rows[f"documents/{split}"] for split in SPLITS}
        pairs = {split: rows[f"pairs/{split}"] for split in SPLITS}
        moved, crowded = self.numbers["moved"], self.numbers["crowded"]
        return {
            "read": self.numbers["read"],
            "rows": sum(by_split.values()),
            **by_split,
            "pairs": sum(pairs.values()),
            # Their own row's text repeats that of another, which stands for both.
            **({"pairs_of_duplicates": moved} if moved else {}),
            "pairs_by_split": pairs,
            "groups": groups,
            **({"tokens": self.numbers["tokens"]} if self.work.config.chunk_tokens is not None else {}),
            # Keys of near-duplicates that too many documents share for each to be held against all others.
            **({"crowded_bands": crowded} if crowded else {}),
            "rejects": self._rejected(),
        }
