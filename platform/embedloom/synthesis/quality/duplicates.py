"""Equal and nearly equal queries: what a row is compared by. The comparison over all rows runs elsewhere.

MinHash is datasketch's. A signature estimates the Jaccard similarity of two queries' character 5-grams with a
standard error of at most 0.044 (128 permutations); characters, because queries are too short for word n-grams and
because that works without blanks between words.
"""

import hashlib
import unicodedata
from functools import lru_cache

import numpy as np
from datasketch import MinHash

from embedloom.ngrams import hash64
from embedloom.synthesis.families.base import Row

_CHARACTERS = 5
_PERMUTATIONS = 128
_SEED = 1  # fixed: signatures must not differ between runs
_MISS_CHANCE = 1e-3  # of a pair whose similarity is exactly the threshold


def exact_key(row: Row) -> int:
    """64-bit hash of the query but for case, blanks and compatibility forms."""
    return hash64(_plain(row))


def signature(row: Row) -> bytes:
    """MinHash of the query's character 5-grams: 128 numbers of 32 bits."""
    text = _plain(row)
    grams = {text[n : n + _CHARACTERS].encode() for n in range(max(1, len(text) - _CHARACTERS + 1))}
    sketch = _empty().copy()
    sketch.update_batch(grams)
    return np.asarray(sketch.hashvalues, dtype="<u4").tobytes()


def similarity(left: bytes, right: bytes) -> float:
    """Estimated Jaccard similarity, 0 to 1."""
    return float(np.mean(np.frombuffer(left, dtype="<u4") == np.frombuffer(right, dtype="<u4")))


def band_keys(signed: bytes, threshold: float) -> list[int]:
    """64-bit keys of the signature's bands; rows of the threshold's similarity share one with a chance of 99.9 %."""
    rows = band_rows(threshold)
    width = 4 * rows
    return [
        int.from_bytes(
            hashlib.blake2b(b"%d:" % start + signed[start : start + width], digest_size=8).digest(), "little"
        )
        for start in range(0, len(signed) - width + 1, width)
    ]


def band_rows(threshold: float) -> int:
    """Longest bands, so fewest comparisons, that miss a pair at the threshold with a chance of one in a thousand.

    b = 128 / r bands of r numbers miss a pair of similarity s with chance (1 - s**r)**b (Leskovec, Rajaraman, Ullman,
    Mining of Massive Datasets, §3.4). Below a threshold of about 0.06 even bands of one number miss more.
    """
    for rows in range(_PERMUTATIONS, 1, -1):
        if (1 - threshold**rows) ** (_PERMUTATIONS // rows) <= _MISS_CHANCE:
            return rows
    return 1


def _plain(row: Row) -> str:
    return " ".join(unicodedata.normalize("NFKC", str(row["query"])).casefold().split())


@lru_cache(maxsize=1)
def _empty() -> MinHash:
    """Drawing the permutations costs more than hashing a query."""
    return MinHash(num_perm=_PERMUTATIONS, seed=_SEED, scheme="affine32")
