"""What duplicates and contamination are judged by: a text without case and blanks, its words and hashed word n-grams."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from datasketch import MinHash

# Scripts that set no blanks count each character as a word; elsewhere a word is a run of letters and digits.
# Their punctuation (U+3000 to U+303F, and the middle dot) is none.
_SINGLE = (
    r"\u2e80-\u2fff\u3005-\u3007\u3021-\u3029\u3031-\u3035\u303b\u3040-\u30fa\u30fc-\u9fff"
    r"\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")
_MULTIPLIER = 0x9E3779B97F4A7C15

Hashes = npt.NDArray[np.uint64]


def folded(text: str) -> str:
    """A text in the form in which two that differ in case, blanks or composed accents are one."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def words_of(text: str) -> list[str]:
    """Case-folded words, without punctuation."""
    return _WORD.findall(text.casefold())


def hash64(text: str) -> int:
    """64-bit hash of a text, the same on every machine; half of a surrogate pair, which JSON can state, is text too."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hashes64(texts: Iterable[str]) -> Hashes:
    """``hash64`` of each text: uint64 [n]."""
    return np.fromiter((hash64(text) for text in texts), dtype=np.uint64)


def ngram_hashes(text: str, size: int, vocabulary: dict[str, int]) -> Hashes:
    """64-bit hashes of a text's word n-grams in order, repetitions included; a shorter text is one n-gram, if any.

    Args:
        text: any text.
        size: words in an n-gram.
        vocabulary: word -> hash, filled as words are met; share one between texts.
    """
    codes = np.array([_word_code(word, vocabulary) for word in words_of(text)], dtype=np.uint64)
    if not len(codes):
        return codes
    size_here = min(size, len(codes))
    weights = np.array([pow(_MULTIPLIER, power, 2**64) for power in range(size_here)], dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, size_here)
    return mix((windows * weights).sum(axis=1, dtype=np.uint64) + np.uint64(size_here))


def mix(values: Hashes) -> Hashes:
    """The 64-bit finaliser of MurmurHash3 (public domain): a bijection that spreads close values."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def minhash(
    values: Iterable[Any], permutations: int, hashed: Callable[[Any], int] | None = None
) -> npt.NDArray[np.uint32]:
    """MinHash signature of a set (Broder 1997), by datasketch: uint32 [permutations], all ones of an empty set.

    Args:
        values: distinct ones.
        permutations: numbers of the signature; two share as large a part of them as their Jaccard similarity, give or
            take 0.5 / sqrt(permutations).
        hashed: from a value to 32 bits; None: values are bytes, and SHA-1 hashes them.
    """
    sketch = _empty_sketch(permutations, hashed).copy()
    sketch.update_batch(values)
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


@lru_cache(maxsize=4)
def _empty_sketch(permutations: int, hashed: Callable[[Any], int] | None) -> "MinHash":
    """Drawing the permutations costs more than hashing a short text; their seed is fixed, as signatures are compared between runs."""
    from datasketch import MinHash

    return MinHash(num_perm=permutations, seed=1, scheme="affine32", hashfunc=hashed)


def band_rows(threshold: float, permutations: int, miss_chance: float) -> int | None:
    """Longest bands, so fewest comparisons, that miss a pair at the threshold with an allowed chance; None: none do.

    b = permutations / r bands of r numbers miss a pair of similarity s with chance (1 - s**r)**b (Leskovec, Rajaraman,
    Ullman, Mining of Massive Datasets, §3.4).
    """
    for rows in range(permutations, 0, -1):
        if (1 - threshold**rows) ** (permutations // rows) <= miss_chance:
            return rows
    return None


def _word_code(word: str, vocabulary: dict[str, int]) -> int:
    code = vocabulary.get(word)
    if code is None:
        code = hash64(word)
        vocabulary[word] = code
    return code
