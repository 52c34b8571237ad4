"""Duplicate documents, exact and near, found in tasks that each compare a part of the hashes or of the pairs.

Exact duplicates share a digest of the normalised text. Near-duplicates are two documents whose sets of word 5-grams have
a Jaccard similarity of at least the threshold. MinHash (Broder 1997) only proposes pairs: those that share a band of their
signatures, whose numbers of n-grams allow the similarity, and whose one-bit sketches do not speak against it. Every proposed
pair is decided on its sets, so nothing is dropped by an estimate, and bands and sketches are chosen so that a pair at the
threshold is missed with a chance of about one in a million. Documents are taken in id order and each is held against the
kept ones before it, so the first stays, and a chain of small changes does not swallow a text unlike the one that is kept.
That order matters for verified pairs alone: they are few (4 % of a web-like corpus), and one task walks over them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.core.prompting import document_text
from embedloom.core.text import Hashes, Offsets, Words, band_rows, distinct_ngrams, minhashes, mix
from embedloom.corpus.exchange import Counts, Numbers, read_rows, received, send, write_rows
from embedloom.corpus.reading import (
    DIGEST_SCHEMA,
    DIGESTS_FOLDER,
    ROW_SCHEMA,
    Work,
    place_of,
    position,
    range_of,
    sorted_name,
)
from embedloom.errors import DataError

WORDS_PER_SHINGLE = 5
_PERMUTATIONS = 128
_MISS_CHANCE = 1e-6  # of a pair whose similarity is exactly the threshold, by the bands
_SKETCH_MISS_CHANCE = 1e-9  # and by the sketches
_SKETCH_BITS = 128
_TEXTS_AT_ONCE = 512
# A band that more documents share is skewed: boilerplate. Held against each other they would cost the square of their number,
# so each is held against the first of them only, and at most so many of those go on to be verified.
MOST_IN_A_BAND = 512
_MOST_VERIFIED = 16

DROP_SCHEMA = pa.schema([("row", pa.int64()), ("first", pa.int64()), ("similarity", pa.float64())])
_BAND_SCHEMA = pa.schema(
    [("key", pa.uint64()), ("position", pa.int64()), ("size", pa.int32()), ("sketch", pa.uint64()), ("sketch2", pa.uint64())]
)  # fmt: skip
_PAIR_SCHEMA = pa.schema([("row", pa.int64()), ("first", pa.int64())])
_SHINGLED_PAIR_SCHEMA = pa.schema([*_PAIR_SCHEMA, ("shingles", pa.list_(pa.uint64()))])
EXACT_BY_ROW, EXACT_BY_FIRST = "exact-by-row", "exact-by-first"
NEAR_BY_ROW, NEAR_BY_FIRST = "near-by-row", "near-by-first"
BANDS_FOLDER = "bands"
_PAIRS_FOLDER, _SHINGLED_FOLDER, _EDGES_FOLDER = "proposed", "shingled", "edges"


def exact_duplicates(digests: Hashes, digests2: Hashes, positions: Numbers) -> tuple[Numbers, Numbers]:
    """Positions whose digest stands at an earlier one too, and the first of these for each: [repeats], [repeats]."""
    order = np.lexsort((positions, digests2, digests))
    digests, digests2, positions = digests[order], digests2[order], positions[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (digests[1:] != digests[:-1]) | (digests2[1:] != digests2[:-1])
    firsts = positions[new][np.cumsum(new) - 1] if len(order) else positions
    return positions[~new], firsts[~new]


def find_exact(item: None, number: int, work: Work) -> Counts:
    """Tell the ranges of both which rows repeat which."""
    table = received(work.place, DIGESTS_FOLDER, number, DIGEST_SCHEMA)
    rows, firsts = exact_duplicates(*(table.column(name).to_numpy() for name in DIGEST_SCHEMA.names))
    _send_drops(work, f"{number:06d}", (EXACT_BY_ROW, EXACT_BY_FIRST), rows, firsts, None)
    return {"duplicates": len(rows)}


def _send_drops(
    work: Work,
    name: str,
    folders: tuple[str, str],
    rows: Numbers,
    firsts: Numbers,
    similarity: npt.NDArray[np.float64] | None,
) -> None:
    scores = pa.nulls(len(rows), pa.float64()) if similarity is None else pa.array(similarity)
    table = pa.table([pa.array(rows), pa.array(firsts), scores], schema=DROP_SCHEMA)
    for folder, towards in zip(folders, (rows, firsts), strict=True):
        send(work.place, f"{folder}/{name}.arrow", table, range_of(towards))


# Bands: what a document is found by.


def choose_bands(threshold: float) -> tuple[int, int]:
    """(permutations, rows a band): the longest bands with an allowed chance of missing a pair at the threshold."""
    permutations = _PERMUTATIONS
    while (rows := band_rows(threshold, permutations, _MISS_CHANCE)) is None:
        permutations *= 2  # only below a threshold of about 0.1
    return permutations, min(rows, permutations // 2)


def bands_of_a_document(threshold: float | None) -> int:
    """Keys that a document is found by."""
    if threshold is None:
        return 0
    permutations, rows = choose_bands(threshold)
    return permutations // rows


@lru_cache(maxsize=8)
def least_agreement(threshold: float) -> int:
    """Sketch bits of two documents at the threshold that agree at least, but for a chance of ``_SKETCH_MISS_CHANCE``.

    A bit agrees where the numbers do, and by half of the others: with a chance of (1 + s) / 2 (b-bit MinHash, Li and Koenig
    2010, with b = 1).
    """
    share = (1 + threshold) / 2
    missed = 0.0
    for bits in range(_SKETCH_BITS + 1):
        missed += math.comb(_SKETCH_BITS, bits) * share**bits * (1 - share) ** (_SKETCH_BITS - bits)
        if missed > _SKETCH_MISS_CHANCE:
            return bits
    return _SKETCH_BITS


@dataclass(frozen=True, slots=True)
class Bands:
    """Keys of documents, an entry for each band of each: arrays of one length.

    Attributes:
        keys: equal where two documents agree in a band; a collision only proposes one pair more.
        positions: of the documents.
        sizes: how many n-grams they have.
        sketches: one bit of each of 128 numbers of their signatures: [entries, 2].
    """

    keys: Hashes
    positions: Numbers
    sizes: npt.NDArray[np.int32]
    sketches: Hashes


def bands_of(shingles: Hashes, offsets: Offsets, positions: Numbers, threshold: float) -> Bands:
    """The bands of documents; those without a word have none.

    Args:
        shingles: sorted n-gram hashes of all documents.
        offsets: where each document's begin, and the end: [documents + 1].
        positions: of the documents.
        threshold: smallest similarity of a near-duplicate.
    """
    permutations, rows = choose_bands(threshold)
    signatures = minhashes((shingles >> np.uint64(32)).astype(np.uint32), offsets, permutations)
    sizes = np.diff(offsets)
    filled = sizes > 0
    signatures, sizes, positions = signatures[filled], sizes[filled], positions[filled]
    bands = permutations // rows
    keys = np.empty((len(positions), bands), dtype=np.uint64)
    for band in range(bands):
        key = np.full(len(positions), band, dtype=np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            key = mix(key ^ signatures[:, column])
        keys[:, band] = key
    # The highest bit of a product with an odd number hangs on all bits of the value.
    bits = (signatures[:, :_SKETCH_BITS] * np.uint32(0x9E3779B1)) >> np.uint32(31)
    packed = np.packbits(bits.astype(np.uint8), axis=1).view(np.uint64)
    repeat = np.repeat(np.arange(len(positions)), bands)
    return Bands(keys.ravel(), positions[repeat], sizes[repeat].astype(np.int32), packed[repeat])


def send_bands(item: None, number: int, work: Work, buckets: int) -> Counts:
    """Send the bands of a range's documents, exact duplicates left out, to where equal keys meet.

    Raises:
        DataError: two of them have one id.
    """
    threshold = work.config.near_duplicate_threshold
    dropped = received(work.place, EXACT_BY_ROW, number, DROP_SCHEMA, ["row"]).column("row").to_numpy()
    _check_ids(work, number, dropped)
    if threshold is None:
        return {}
    tables = [
        _band_table(bands_of(*shingles, positions, threshold))
        for positions, shingles in _shingled(work, number, dropped)
    ]
    table = pa.concat_tables(tables) if tables else _BAND_SCHEMA.empty_table()
    receivers = table.column("key").to_numpy() % np.uint64(buckets)
    send(work.place, f"{BANDS_FOLDER}/{number:06d}.arrow", table, receivers)
    return {}


def _shingled(work: Work, number: int, dropped: Numbers) -> Iterator[tuple[Numbers, tuple[Hashes, Offsets]]]:
    """Positions and n-grams of a range's documents, some at a time."""
    words = Words()
    first = position(number, 0)
    for table in read_rows(work.place, sorted_name(number), ROW_SCHEMA, ["title", "text"]):
        for start in range(0, table.num_rows, _TEXTS_AT_ONCE):
            part = table.slice(start, _TEXTS_AT_ONCE)
            positions = np.arange(first + start, first + start + part.num_rows)
            stays = ~np.isin(positions, dropped)
            texts = _texts(part.filter(pa.array(stays)))
            yield positions[stays], distinct_ngrams(texts, WORDS_PER_SHINGLE, words)
        first += table.num_rows


def _texts(table: pa.Table) -> list[str]:
    columns = (table.column(name).to_pylist() for name in ("title", "text"))
    return [document_text(title, text) for title, text in zip(*columns, strict=True)]


def _check_ids(work: Work, number: int, dropped: Numbers) -> None:
    """Refuse an id of two texts; rows of one id lie in one range, one after the other."""
    tables = list(read_rows(work.place, sorted_name(number), ROW_SCHEMA, ["id", "source"]))
    if not tables:
        return
    table = pa.concat_tables(tables)
    stays = np.ones(table.num_rows, dtype=bool)
    stays[place_of(dropped)] = False
    left = table.filter(pa.array(stays))
    ids = left.column("id").combine_chunks()
    same = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False) if len(ids) else np.zeros(0, bool)
    if same.any():
        at = int(np.argmax(same))
        one, other = left.slice(at, 2).column("source").to_pylist()
        raise DataError(
            f"corpus.sources: id {ids[at].as_py()!r} stands for two texts ({one} and {other}); ids must be unique, "
            "or leave out id_column and ids are made from the content"
        )


def _band_table(bands: Bands) -> pa.Table:
    columns = (bands.keys, bands.positions, bands.sizes, *bands.sketches.T)
    return pa.table([pa.array(np.ascontiguousarray(column)) for column in columns], schema=_BAND_SCHEMA)


# Pairs: documents with a key in common that may be near-duplicates.


def propose(bands: Bands, threshold: float) -> tuple[Numbers, Numbers, int]:
    """Pairs that share a key and may be near-duplicates, each once: later position, earlier position, [pairs].

    The third number counts the keys that more than ``MOST_IN_A_BAND`` documents share.
    """
    order = np.lexsort((bands.positions, bands.keys))
    keys = bands.keys[order]
    bounds = (
        np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
        if len(keys)
        else np.zeros(1, int)
    )
    lengths = np.diff(bounds)
    plain = np.repeat((lengths > 1) & (lengths <= MOST_IN_A_BAND), lengths)
    found = list(_neighbours(bands, order[plain], threshold))
    crowded = np.flatnonzero(lengths > MOST_IN_A_BAND)
    for group in crowded:
        found += _against_first(bands, order[bounds[group] : bounds[group + 1]], threshold)
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), len(crowded)
    later, earlier = (bands.positions[np.concatenate(side)] for side in zip(*found, strict=True))
    pairs = np.unique(np.stack([later, earlier]), axis=1)
    return pairs[0], pairs[1], len(crowded)


def _neighbours(bands: Bands, order: Numbers, threshold: float) -> Iterator[tuple[Numbers, Numbers]]:
    """Entries (later, earlier) of all pairs that share a key, as far as sizes and sketches allow."""
    keys = bands.keys[order]
    at = np.arange(len(order))
    for distance in range(1, MOST_IN_A_BAND):
        at = at[at + distance < len(order)]
        at = at[keys[at] == keys[at + distance]]
        if not len(at):
            return
        earlier, later = order[at], order[at + distance]
        likely = _likely(bands, later, earlier, threshold)
        yield later[likely], earlier[likely]


def _against_first(bands: Bands, group: Numbers, threshold: float) -> Iterator[tuple[Numbers, Numbers]]:
    """Entries (later, earlier) of a crowded key: each is held against the first, and the first likely ones are taken."""
    taken = np.zeros(len(group), dtype=np.int64)
    for place in range(MOST_IN_A_BAND):
        rest = np.arange(place + 1, len(group))
        rest = rest[taken[rest] < _MOST_VERIFIED]
        likely = rest[_likely(bands, group[rest], np.full(len(rest), group[place]), threshold)]
        taken[likely] += 1
        yield group[likely], np.full(len(likely), group[place])


def _likely(bands: Bands, later: Numbers, earlier: Numbers, threshold: float) -> npt.NDArray[np.bool_]:
    one, other = bands.sizes[later], bands.sizes[earlier]
    agreed = _SKETCH_BITS - np.bitwise_count(bands.sketches[later] ^ bands.sketches[earlier]).sum(
        axis=1, dtype=np.int64
    )
    # Sets of unlike sizes cannot be that similar; most proposals of short texts end here.
    fits = np.minimum(one, other) >= threshold * np.maximum(one, other)
    return np.asarray(fits & (agreed >= least_agreement(threshold)))


def propose_pairs(item: None, number: int, work: Work) -> Counts:
    """Send the pairs of a bucket of keys to the ranges of their later documents."""
    table = received(work.place, BANDS_FOLDER, number, _BAND_SCHEMA)
    keys, positions, sizes, *sketches = (table.column(name).to_numpy() for name in _BAND_SCHEMA.names)
    bands = Bands(keys, positions, sizes, np.stack(sketches, axis=1))
    later, earlier, crowded = propose(bands, work.config.near_duplicate_threshold or 1.0)
    send(
        work.place,
        f"{_PAIRS_FOLDER}/{number:06d}.arrow",
        pa.table([later, earlier], schema=_PAIR_SCHEMA),
        range_of(later),
    )
    return {"pairs": len(later), "crowded": crowded}


# Verification: the n-grams of the later document go to where the earlier one lies.


def send_shingles(item: None, number: int, work: Work) -> Counts:
    """Send the n-grams of a range's documents to the ranges of what they may repeat."""
    table = received(work.place, _PAIRS_FOLDER, number, _PAIR_SCHEMA)
    if not table.num_rows:
        return {"pairs": 0}
    # One pair may have come from several buckets.
    rows, firsts = np.unique(np.stack([table.column(name).to_numpy() for name in _PAIR_SCHEMA.names]), axis=1)
    wanted, slots = np.unique(rows, return_inverse=True)
    shingles, offsets = _shingles_at(work, number, wanted)
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(shingles))
    pairs = pa.table(
        [pa.array(rows), pa.array(firsts), lists.take(pa.array(slots))], schema=_SHINGLED_PAIR_SCHEMA
    )
    send(work.place, f"{_SHINGLED_FOLDER}/{number:06d}.arrow", pairs, range_of(firsts))
    return {"pairs": len(rows)}


def verify_pairs(item: None, number: int, work: Work) -> Counts:
    """Write the near-duplicates among the pairs whose earlier document lies here."""
    table = received(work.place, _SHINGLED_FOLDER, number, _SHINGLED_PAIR_SCHEMA)
    if not table.num_rows:
        return {"edges": 0}
    threshold = work.config.near_duplicate_threshold or 1.0
    firsts = table.column("first").to_numpy()
    wanted, slots = np.unique(firsts, return_inverse=True)
    shingles, offsets = _shingles_at(work, number, wanted)
    column = table.column("shingles").combine_chunks()
    others, bounds = column.values.to_numpy(), column.offsets.to_numpy()
    scores = np.array(
        [
            jaccard(others[bounds[n] : bounds[n + 1]], shingles[offsets[slot] : offsets[slot + 1]])
            for n, slot in enumerate(slots.tolist())
        ]
    )
    near = scores >= threshold
    columns = (table.column("row").to_numpy()[near], firsts[near], scores[near])
    edges = pa.table([pa.array(one) for one in columns], schema=DROP_SCHEMA)
    return {"edges": write_rows(work.place, f"{_EDGES_FOLDER}/{number:06d}.arrow", DROP_SCHEMA, [edges])}


def jaccard(left: Hashes, right: Hashes) -> float:
    """Similarity of two sorted sets of hashes; 0 if both are empty."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    union = len(left) + len(right) - shared
    return shared / union if union else 0.0


def _shingles_at(work: Work, number: int, positions: Numbers) -> tuple[Hashes, Offsets]:
    """N-grams of some documents of a range, given by sorted positions."""
    places = place_of(positions)
    found = []
    first = 0
    for table in read_rows(work.place, sorted_name(number), ROW_SCHEMA, ["title", "text"]):
        here = places[(places >= first) & (places < first + table.num_rows)] - first
        found += _texts(table.take(pa.array(here)))
        first += table.num_rows
    return distinct_ngrams(found, WORDS_PER_SHINGLE, Words())


# The choice: which documents stay, a walk over verified pairs in the order of the later document.


def first_matches(
    rows: Numbers, firsts: Numbers, similarity: npt.NDArray[np.float64]
) -> tuple[Numbers, Numbers, npt.NDArray[np.float64]]:
    """Documents to drop, the kept one that each repeats (of several the first), and their similarity.

    Args:
        rows: later document of each verified pair.
        firsts: earlier document.
        similarity: of the two.
    """
    order = np.lexsort((firsts, rows))
    dropped: dict[int, int] = {}
    chosen = []
    for edge, row, first in zip(order.tolist(), rows[order].tolist(), firsts[order].tolist(), strict=True):
        if row not in dropped and first not in dropped:
            dropped[row] = first
            chosen.append(edge)
    return rows[chosen], firsts[chosen], similarity[chosen]


def choose_near(item: None, number: int, work: Work) -> Counts:
    """Tell the ranges of both which documents are dropped as near-duplicates of which."""
    tables = [
        table
        for name in work.place.names(_EDGES_FOLDER, ".arrow")
        for table in read_rows(work.place, name, DROP_SCHEMA)
    ]
    table = pa.concat_tables([DROP_SCHEMA.empty_table(), *tables])
    found = first_matches(*(table.column(name).to_numpy() for name in DROP_SCHEMA.names))
    _send_drops(work, f"{number:06d}", (NEAR_BY_ROW, NEAR_BY_FIRST), *found)
    return {"near_duplicates": len(found[0])}
