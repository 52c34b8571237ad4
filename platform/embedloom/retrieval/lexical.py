"""A BM25 index of texts' words: postings counted shard by shard, put together in one task, memory-mapped to be searched.

The finished index is bm25s's own (``bm25s.BM25.load(FOLDER, mmap=True)`` reads it): every score a word gives a text is computed
ahead (Lucene's BM25; Lu 2024, arXiv 2407.03618), and a search adds up those of the query's words. Its rows are those of the
vectors. Building holds one shard and the vocabulary in memory, searching the vocabulary and a number for every row.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
import Stemmer

from embedloom.compute.shards import Tasks, run_tasks
from embedloom.config.cluster import PoolConfig
from embedloom.config.embedding import LexicalConfig
from embedloom.core.language import language_of
from embedloom.core.progress import note
from embedloom.core.storage import Place
from embedloom.core.text import language_name, search_terms
from embedloom.errors import ConfigError, DataError
from embedloom.retrieval.inputs import TextSource
from embedloom.retrieval.ledger import ROWS_FOLDER, Numbers, texts_of
from embedloom.retrieval.search import Matrix, Positions

# What a text is found by.


@dataclass(frozen=True, slots=True)
class Analyzer:
    """Turns texts and queries into the words they meet in; picklable."""

    stemmer: str | None = None  # Snowball's name

    @classmethod
    def of(cls, language: str | None) -> "Analyzer":
        """The words of a language, by its ISO 639-3 code; None: words as they stand.

        Raises:
            ConfigError: Snowball has no stemmer for it.
        """
        if language is None:
            return cls()
        name = language_name(language).lower()
        if name not in Stemmer.algorithms():
            raise ConfigError(
                f"embedding.lexical.language: {language!r} ({name}) has no stemmer; allowed: auto, null, which finds words of any "
                f"language as they stand, or the code of one of: {', '.join(Stemmer.algorithms())}"
            )
        return cls(name)

    def words(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """The words of each text, in order, repetitions kept."""
        stem = None if self.stemmer is None else Stemmer.Stemmer(self.stemmer)
        for text in texts:
            found = search_terms(text)
            yield found if stem is None else stem.stemWords(found)


AUTO = "auto"
_SAMPLE_SHARDS, _SAMPLE_ROWS = 8, 64  # whose language is looked at


def language_found(texts: Sequence[str]) -> str | None:
    """The language of most of these texts, if Snowball knows it."""
    found = language_of(texts)
    return found if found and language_name(found).lower() in Stemmer.algorithms() else None


def _sampled_language(parts: Sequence[str], source: TextSource, out: Place) -> str | None:
    """The language of an artefact's texts, by some of each of some shards, far apart; runs in a task."""
    step = max(1, len(parts) // _SAMPLE_SHARDS)
    sample: list[str] = []
    for part in parts[::step][:_SAMPLE_SHARDS]:
        rows = out.read_table(f"{ROWS_FOLDER}/{part}", ["file", "row"]).slice(0, _SAMPLE_ROWS)
        sample += texts_at(source, np.asarray(rows.column("file")), np.asarray(rows.column("row")))
    return language_found(sample)


# Counting: which words stand in which rows of a shard, and how often.


LEXICAL_FOLDER = "lexical"
LEXICAL_FACTS = "lexical.json"
_POSTINGS_FOLDER = "postings"  # of each shard, gone once the index is there
_POSTINGS_SCHEMA = pa.schema(
    [("term", pa.string()), ("rows", pa.list_(pa.int32())), ("counts", pa.list_(pa.int32()))]
)


def postings(texts: Iterable[Sequence[str]]) -> pa.Table:
    """A line a word: the rows it stands in, ascending, and how often it stands in each.

    Args:
        texts: words of each row.
    """
    vocabulary: dict[str, int] = {}
    ids, lengths = [np.empty(0, np.int64)], []
    for words in texts:
        ids.append(np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], np.int64))
        lengths.append(len(words))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    pairs, counts = np.unique(np.concatenate(ids) * max(1, len(lengths)) + rows, return_counts=True)
    terms, rows = np.divmod(pairs, max(1, len(lengths)))
    ends = np.searchsorted(terms, np.arange(len(vocabulary) + 1)).astype(np.int32)
    columns = [
        pa.array(list(vocabulary), pa.string()),
        pa.ListArray.from_arrays(ends, rows.astype(np.int32)),
        pa.ListArray.from_arrays(ends, counts.astype(np.int32)),
    ]
    return pa.table(columns, schema=_POSTINGS_SCHEMA)


def texts_at(source: TextSource, files: Numbers, rows: Numbers) -> list[str]:
    """What a model is given of these rows of an input.

    Args:
        source: the input.
        files: number of each row's file; ascending.
        rows: its number in the file; ascending within a file.
    """
    texts: list[str] = []
    for file in np.unique(files):
        mine = rows[files == file]
        place, name = source.to_read(int(file))
        table = place.read_rows(name, int(mine[0]), int(mine[-1]) + 1, source.columns)
        texts.extend(texts_of(table.take(pa.array(mine - mine[0])), source))
    return texts


def _count_shard(part: str, source: TextSource, out: Place, analyzer: Analyzer) -> None:
    """Write the postings of one shard, if they are not there."""
    name = f"{_POSTINGS_FOLDER}/{part}"
    if out.exists(name):
        return
    rows = out.read_table(f"{ROWS_FOLDER}/{part}", ["file", "row"])
    texts = texts_at(source, np.asarray(rows.column("file")), np.asarray(rows.column("row")))
    out.write_table(name, postings(analyzer.words(texts)))


# Putting shards together: the vocabulary and its frequencies first, then every shard's scores, to where they belong.


@dataclass(frozen=True, slots=True)
class _Shard:
    """Postings of a shard as flat arrays."""

    terms: list[str]
    sizes: Numbers  # rows of each term
    rows: Numbers
    counts: Numbers

    @classmethod
    def read(cls, out: Place, part: str) -> "_Shard":
        table = out.read_table(f"{_POSTINGS_FOLDER}/{part}").combine_chunks()
        rows, counts = (table.column(name).combine_chunks() for name in ("rows", "counts"))
        sizes = np.asarray(rows.value_lengths(), np.int64)
        return cls(
            table.column("term").to_pylist(),
            sizes,
            np.asarray(rows.flatten(), np.int64),
            np.asarray(counts.flatten(), np.int64),
        )


def _merge_shards(
    parts: Sequence[str], shard_rows: Sequence[int], out: Place, config: LexicalConfig
) -> dict[str, Any]:
    """Write the index of all shards and return its facts; runs in a task."""
    vocabulary: dict[str, int] = {}
    frequencies = np.zeros(0, np.int64)
    words = 0
    for part in parts:
        shard = _Shard.read(out, part)
        ids = np.array([vocabulary.setdefault(term, len(vocabulary)) for term in shard.terms], np.int64)
        frequencies = np.concatenate([frequencies, np.zeros(len(vocabulary) - len(frequencies), np.int64)])
        frequencies[ids] += shard.sizes
        words += int(shard.counts.sum())
    if not words:
        raise DataError(f"embedding.lexical: {out.uri}: no text has a word")
    rows = sum(shard_rows)
    # As bm25s has it, so that its numbers are these to the last bit: log in float64, kept in float32.
    inverse = np.log(1 + (rows - frequencies + 0.5) / (frequencies + 0.5)).astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(frequencies)])
    with tempfile.TemporaryDirectory(prefix="embedloom-lexical-") as scratch:
        scores = np.memmap(Path(scratch, "scores"), np.float32, "w+", shape=(int(starts[-1]),))
        numbers = np.memmap(Path(scratch, "numbers"), np.int32, "w+", shape=(int(starts[-1]),))
        filled, first, average = starts[:-1].copy(), 0, words / rows
        for part, size in zip(parts, shard_rows, strict=True):
            shard = _Shard.read(out, part)
            ids = np.array([vocabulary[term] for term in shard.terms], np.int64)
            offsets = np.arange(len(shard.rows)) - np.repeat(
                np.cumsum(shard.sizes) - shard.sizes, shard.sizes
            )
            places = np.repeat(filled[ids], shard.sizes) + offsets
            lengths = np.bincount(shard.rows, weights=shard.counts, minlength=size)[shard.rows]
            saturation = shard.counts / (
                config.k1 * ((1 - config.b) + config.b * lengths / average) + shard.counts
            )
            scores[places] = np.repeat(inverse[ids], shard.sizes) * saturation
            numbers[places] = first + shard.rows
            filled[ids] += shard.sizes
            first += size
        index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
        index.scores = {"data": scores, "indices": numbers, "indptr": starts, "num_docs": rows}
        index.nonoccurrence_array = None
        index.vocab_dict = {**vocabulary, "": len(vocabulary)}  # bm25s's own place for what has no word
        _save(index, Path(scratch, "index"), out)
    facts = {"rows": rows, "terms": len(vocabulary), "words": words, "postings": int(starts[-1])}
    facts = {**facts, **config.model_dump(include={"language", "k1", "b"})}
    out.write_json(LEXICAL_FACTS, facts)
    return facts


def _save(index: bm25s.BM25, scratch: Path, out: Place) -> None:
    index.save(scratch, show_progress=False)
    folder = out.child(LEXICAL_FOLDER)
    folder.remove()
    if folder.is_local:
        folder.local.mkdir(parents=True)
    folder.upload(scratch)


def build_lexical(
    stage: str,
    config: LexicalConfig,
    source: TextSource,
    parts: Sequence[str],
    shard_rows: Sequence[int],
    out: Place,
    pool: PoolConfig,
    tasks: Tasks = run_tasks,
) -> dict[str, Any]:
    """Write ``lexical/`` and, last, ``lexical.json`` of a vectors artefact whose ``rows/`` are there; returns the facts.

    Shards are counted in tasks wherever the pool has room, and a killed build counts none twice; one task of the pool puts
    them together.

    Args:
        stage: named on progress lines and errors.
        config: language and BM25's constants.
        source: the texts.
        parts: files of ``rows/``, in order.
        shard_rows: rows of each.
        out: the artefact.
        pool: what a task reserves, and how many run at once.
        tasks: what runs them.

    Raises:
        ConfigError: a language without a stemmer.
        DataError: no text has a word.
    """
    if config.language == AUTO:
        [language] = tasks(stage, _sampled_language, [list(parts)], source, out, pool=pool)
        config = config.model_copy(update={"language": language})
        note(
            stage,
            f"words are indexed as of {'any language' if language is None else language_name(language)}",
        )
    for _ in tasks(stage, _count_shard, parts, source, out, Analyzer.of(config.language), pool=pool):
        pass
    facts: dict[str, Any]
    [facts] = tasks(stage, _merge_shards, [list(parts)], list(shard_rows), out, config, pool=pool)
    out.child(_POSTINGS_FOLDER).remove()
    return facts


# Searching.


class LexicalIndex:
    """A BM25 index, its arrays mapped from disk."""

    def __init__(self, index: bm25s.BM25, analyzer: Analyzer, facts: dict[str, Any]) -> None:
        self._index = index
        self._analyzer = analyzer
        self.facts = facts

    def __len__(self) -> int:
        """Rows."""
        return int(self._index.scores["num_docs"])

    def scores(self, query: str) -> Matrix:
        """BM25 of every row: float32 [rows], 0 where no word of the query stands."""
        (words,) = self._analyzer.words([query])
        known = self._index.get_tokens_ids(words)
        if not known:
            return np.zeros(len(self), np.float32)
        found: Matrix = self._index.get_scores_from_ids(known)
        return found

    def search(self, query: str, count: int) -> tuple[Positions, Matrix]:
        """Rows and scores of the best, best first, equal ones in the order of the rows: [<= count] each.

        A row without any word of the query is not among them.
        """
        return best_rows(self.scores(query), count)


def best_rows(scores: Matrix, count: int) -> tuple[Positions, Matrix]:
    """The highest scores above 0, best first, equal ones in the order of the rows: rows and scores, [<= count] each."""
    count = min(count, len(scores))
    least = np.partition(scores, len(scores) - count)[len(scores) - count] if count else np.float32(np.inf)
    over, at = np.flatnonzero(scores > max(least, 0)), np.flatnonzero(scores == least)
    rows = np.concatenate([over, at[: count - len(over)] if least > 0 else at[:0]]).astype(np.int64)
    rows = rows[np.lexsort((rows, -scores[rows]))]
    return rows, scores[rows]


def load_lexical(place: Place) -> LexicalIndex | None:
    """The index of a vectors artefact, memory-mapped; None where it was embedded without.

    Raises:
        DataError: files that do not belong together, or an artefact that is not on this machine.
    """
    if not place.exists(LEXICAL_FACTS):
        return None
    facts = place.read_json(LEXICAL_FACTS)
    folder = place.child(LEXICAL_FOLDER)
    try:
        index = bm25s.BM25.load(folder.local, mmap=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{folder.uri}: not readable as an index of bm25s ({error}); embed again") from error
    seen = (index.scores["num_docs"], len(index.scores["data"]), len(index.scores["indptr"]) - 1)
    if seen != (facts["rows"], facts["postings"], facts["terms"]):
        raise DataError(
            f"{folder.uri}: {seen[0]} rows, {seen[1]} postings and {seen[2]} terms, {LEXICAL_FACTS} says {facts['rows']}, "
            f"{facts['postings']} and {facts['terms']}; embed again"
        )
    return LexicalIndex(index, Analyzer.of(facts["language"]), facts)


def index_texts(texts: Sequence[str], config: LexicalConfig) -> LexicalIndex:
    """An index of texts in memory, by bm25s itself."""
    if config.language == AUTO:
        step = max(1, len(texts) // (_SAMPLE_SHARDS * _SAMPLE_ROWS))
        config = config.model_copy(update={"language": language_found(texts[::step])})
    analyzer = Analyzer.of(config.language)
    index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
    index.index(list(analyzer.words(texts)), show_progress=False)
    return LexicalIndex(
        index, analyzer, {"rows": len(texts), **config.model_dump(include={"language", "k1", "b"})}
    )
