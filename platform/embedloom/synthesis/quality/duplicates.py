"""Equal and nearly equal queries: what a row is compared by. The comparison over all rows runs elsewhere.

MinHash is datasketch's. A signature estimates the Jaccard similarity of two queries' character 5-grams with a
standard error of at most 0.044 (128 permutations); characters, because queries are too short for word n-grams and
because that works without blanks between words.
"""

import hashlib
import unicodedata

from embedloom.ngrams import band_rows, hash64, minhash
from embedloom.synthesis.families.base import Row

_CHARACTERS = 5
_PERMUTATIONS = 128
_MISS_CHANCE = 1e-3  # of a pair whose similarity is exactly the threshold


def exact_key(row: Row) -> int:
    """64-bit hash of the query but for case, blanks and compatibility forms."""
    return hash64(_plain(row))


def signature(row: Row) -> bytes:
    """MinHash of the query's character 5-grams: 128 numbers of 32 bits."""
    text = _plain(row)
    grams = {text[n : n + _CHARACTERS].encode() for n in range(max(1, len(text) - _CHARACTERS + 1))}
    return minhash(grams, _PERMUTATIONS).astype("<u4").tobytes()


def band_keys(signed: bytes, threshold: float) -> list[int]:
    """64-bit keys of the signature's bands; rows of the threshold's similarity share one with a chance of 99.9 %."""
    # Below a threshold of about 0.06 even bands of one number miss more.
    rows = band_rows(threshold, _PERMUTATIONS, _MISS_CHANCE) or 1
    width = 4 * rows
    return [
        int.from_bytes(
            hashlib.blake2b(b"%d:" % start + signed[start : start + width], digest_size=8).digest(), "little"
        )
        for start in range(0, len(signed) - width + 1, width)
    ]


def _plain(row: Row) -> str:
    return " ".join(unicodedata.normalize("NFKC", str(row["query"])).casefold().split())
