"""Words, n-grams and languages: what a text is compared by, and what a language is called."""

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from datasketch import MinHash


# Text cleaning: Unicode NFC, no control characters, plain line ends and blanks.


_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Control characters but tab and newline, lone surrogates (JSON can carry them, UTF-8 cannot), byte-order
# marks, zero-width blanks and soft hyphens: invisible, yet each would change tokens and hashes. Joiners stay:
# scripts need them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ud800-\udfff\ufeff\ufffe\uffff]")
# Single blanks, nearly all of them, are not matched: replacing each by itself took half of the cleaning's time.
_INNER_BLANKS = re.compile(r"(?<=\S)(?:[^\S\n]{2,}|[^\S\n ])")
# After the inner runs; both branches are anchored, since an open run would take quadratic time on long blanks.
_TRAILING_BLANKS = re.compile(r"(?<=\S) $|^[^\S\n]+$", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    """Normalise a text; indentation stays (code, lists), other runs of blanks or empty lines become one."""
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    text = unicodedata.normalize("NFC", text)
    text = _TRAILING_BLANKS.sub("", _INNER_BLANKS.sub(" ", text))
    return (_EMPTY_LINES.sub("\n\n", text) if "\n\n\n" in text else text).strip()


def clean_line(text: str) -> str:
    """Normalise a text onto one line (titles, queries)."""
    return " ".join(clean_text(text).split())


# What duplicates and contamination are judged by: a text without case and blanks, its words and hashed word n-grams.


# A word is a run of letters and digits with the marks that belong to them: vowel signs, viramas and accents are neither letters
# nor digits, and without them a Hindi word falls into its consonants. Scripts that set no blanks count each character, with its
# marks, as a word; their punctuation (U+3000 to U+303F, and the middle dot) is none. No boundary parts what Unicode calls one
# character (UAX #29, extended grapheme clusters).
_IDEOGRAPHS_KANA_HANGUL = (
    r"\u2e80-\u2fff\u3005-\u3007\u3021-\u3029\u3031-\u3035\u303b\u3040-\u30fa\u30fc-\u9fff"
    r"\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
# UAX #14 calls them complex context, as lines break in them by a dictionary alone: Thai, Lao, Myanmar, Khmer, Tai Le, New Tai
# Lue, Tai Tham, Tai Viet, Ahom.
_WITHOUT_BLANKS = (
    (0x0E01, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF),
    (0xA9E0, 0xA9FF), (0xAA60, 0xAADF), (0x11700, 0x1174F),
)  # fmt: skip
# Where marks stand; those left out (U+FE00 to U+FE0F, U+E0100 on) only pick the glyph of an ideograph or emoji.
_MARKED = (range(0x0300, 0xFE00), range(0xFE20, 0x20000))
_JOINERS = "\u200c\u200d"  # within a word they choose its letters' forms, as in Persian and Sinhala
_MULTIPLIER = 0x9E3779B97F4A7C15

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]
_HASHED_AT_ONCE = 2**18  # numbers, which a processor's cache holds


def folded(text: str) -> str:
    """A text in the form in which two that differ in case, blanks or composed accents are one."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def words_of(text: str) -> list[str]:
    """Case-folded words in composed form, without punctuation; the same rule in every script, see above."""
    return _patterns().word.findall(_composed(text))


def terms_of(text: str) -> list[tuple[str, ...]]:
    """Words of a text, where those that nothing parts in a script without blanks are one term (東京 of 東, 京)."""
    word, alone = _patterns()
    terms: list[tuple[str, ...]] = []
    end = -1  # of the last word, if it stands alone
    for found in word.finditer(_composed(text)):
        single = alone.match(found[0]) is not None
        if single and found.start() == end:
            terms[-1] += (found[0],)
        else:
            terms.append((found[0],))
        end = found.end() if single else -1
    return terms


def search_terms(text: str) -> list[str]:
    """What a search for words finds a text by: its words, and of characters that no blank parts every two neighbours.

    東京都 is found by 東京 and by 京都, as in Lucene's CJKAnalyzer; a single character stands for itself.
    """
    found: list[str] = []
    for term in terms_of(text):
        found += map("".join, pairwise(term)) if len(term) > 1 else term
    return found


def stands_alone(word: str) -> bool:
    """Whether a word is one character of a script that sets no blanks."""
    return _patterns().alone.match(word) is not None


def letters_in(word: str) -> int:
    """Letters and digits of a word, without marks and joiners."""
    return sum(one.isalnum() for one in word)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text.casefold())


class _Patterns(NamedTuple):
    word: re.Pattern[str]
    alone: re.Pattern[str]  # the first character of a word that is one by itself


@lru_cache(maxsize=1)
def _patterns() -> _Patterns:
    """Built when they are first asked for, from Python's own tables: ten milliseconds."""
    marks = [
        chr(code) for span in _MARKED for code in span if unicodedata.category(chr(code)) in ("Mn", "Mc")
    ]
    letters = [
        chr(code) for first, last in _WITHOUT_BLANKS for code in range(first, last + 1) if chr(code).isalpha()
    ]
    alone = _IDEOGRAPHS_KANA_HANGUL + _spans(letters)
    extend = _spans(marks)
    run = rf"[^\W{alone}][^\W{alone}]*(?:[{extend}{_JOINERS}]+[^\W{alone}]*)*"
    return _Patterns(re.compile(rf"[{alone}][{extend}]*|{run}"), re.compile(f"[{alone}]"))


def _spans(characters: Sequence[str]) -> str:
    """Ascending characters as the inside of a character class."""
    spans: list[list[str]] = []
    for one in characters:
        if spans and ord(one) == ord(spans[-1][1]) + 1:
            spans[-1][1] = one
        else:
            spans.append([one, one])
    return "".join(f"{first}-{last}" for first, last in spans)


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


def distinct_ngrams(texts: Sequence[str], size: int, vocabulary: "Words") -> tuple[Hashes, Offsets]:
    """The n-grams of ``ngram_hashes`` of many texts, sorted and each once: the hashes of all, and where each text's begin.

    Args:
        texts: any texts.
        size: words in an n-gram.
        vocabulary: share one between calls.

    Returns:
        uint64 [n-grams], int64 [texts + 1].
    """
    words = [words_of(text) for text in texts]
    counts = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    codes = np.fromiter(
        (vocabulary[word] for own in words for word in own), dtype=np.uint64, count=int(counts.sum())
    )
    begins = np.cumsum(counts) - counts
    used = np.minimum(counts, size)
    grams = np.where(counts > 0, counts - used + 1, 0)
    offsets: Offsets = np.concatenate([[0], np.cumsum(grams)])
    owner = np.repeat(np.arange(len(words)), grams)
    first = np.repeat(begins - offsets[:-1], grams) + np.arange(
        len(owner)
    )  # word that each n-gram begins with
    hashes = np.repeat(used, grams).astype(np.uint64)
    for power in range(size):
        long = used[owner] > power
        weight = np.uint64(pow(_MULTIPLIER, power, 2**64))
        hashes[long] += codes[first[long] + power] * weight
    hashes = mix(hashes)
    for start, stop in pairwise(offsets.tolist()):
        hashes[start:stop].sort()
    kept = np.ones(len(hashes), dtype=bool)
    kept[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return hashes[kept], np.concatenate([[0], np.cumsum(np.bincount(owner[kept], minlength=len(words)))])


class Words(dict[str, int]):
    """Words and their 64-bit hashes, made as they are asked for."""

    def __missing__(self, word: str) -> int:
        """A new word."""
        code = self[word] = hash64(word)
        return code


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


def minhashes(values: npt.NDArray[np.uint32], offsets: Offsets, permutations: int) -> npt.NDArray[np.uint32]:
    """``minhash`` of many sets of 32-bit values at once, and equal to it: uint32 [sets, permutations].

    datasketch takes 100 us a set of a hundred, of which the hashing itself is a quarter; this takes that.

    Args:
        values: of all sets.
        offsets: where each set begins, and the end: [sets + 1].
        permutations: numbers of a signature.
    """
    factors, summands = (
        np.asarray(one, dtype=np.uint32) for one in _empty_sketch(permutations, int).permutations
    )
    found = np.full((len(offsets) - 1, permutations), np.uint32(0xFFFFFFFF))
    mixed = _mix32(values)
    filled = np.flatnonzero(np.diff(offsets))
    for group in np.array_split(filled, max(1, len(values) * permutations // _HASHED_AT_ONCE)):
        if len(group):
            first, last = offsets[group[0]], offsets[group[-1] + 1]
            hashed = mixed[first:last, None] * factors + summands
            found[group] = np.minimum.reduceat(hashed, offsets[group] - first, axis=0)
    return found


def _mix32(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The 32-bit finaliser of MurmurHash3 (public domain), as datasketch mixes what it permutes."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


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


# Languages by ISO 639-3 code: which a config may name, and what a prompt calls them in English.
#
# The list holds every language of XLM-R (arXiv 1911.02116, table 6), which e5-mistral samples its synthetic data
# from (arXiv 2401.00368 §4.1), and the further ones that the language check can tell apart. A macrolanguage code
# (``zho``, ``nor``, ``ara``) stands for its usual written form, as XLM-R uses it.


# code, then the ISO 639-1 code where there is one, then the English name.
_TABLE = """
afr af Afrikaans
amh am Amharic
ara ar Arabic
asm as Assamese
aze az Azerbaijani
bel be Belarusian
ben bn Bengali
bos bs Bosnian
bre br Breton
bul bg Bulgarian
cat ca Catalan
ces cs Czech
cym cy Welsh
dan da Danish
deu de German
ell el Greek
eng en English
epo eo Esperanto
est et Estonian
eus eu Basque
fas fa Persian
fin fi Finnish
fra fr French
fry fy Western Frisian
gla gd Scottish Gaelic
gle ga Irish
glg gl Galician
guj gu Gujarati
hau ha Hausa
heb he Hebrew
hin hi Hindi
hrv hr Croatian
hun hu Hungarian
hye hy Armenian
ind id Indonesian
isl is Icelandic
ita it Italian
jav jv Javanese
jpn ja Japanese
kan kn Kannada
kat ka Georgian
kaz kk Kazakh
khm km Khmer
kir ky Kyrgyz
kor ko Korean
kur ku Kurdish
lao lo Lao
lat la Latin
lav lv Latvian
lit lt Lithuanian
mal ml Malayalam
mar mr Marathi
mkd mk Macedonian
mlg mg Malagasy
mon mn Mongolian
msa ms Malay
mya my Burmese
nep ne Nepali
nld nl Dutch
nor no Norwegian
ori or Odia
orm om Oromo
pan pa Punjabi
pol pl Polish
por pt Portuguese
pus ps Pashto
ron ro Romanian
rus ru Russian
san sa Sanskrit
sin si Sinhala
slk sk Slovak
slv sl Slovenian
snd sd Sindhi
som so Somali
spa es Spanish
sqi sq Albanian
srp sr Serbian
sun su Sundanese
swa sw Swahili
swe sv Swedish
tam ta Tamil
tel te Telugu
tgl tl Tagalog
tha th Thai
tur tr Turkish
uig ug Uyghur
ukr uk Ukrainian
urd ur Urdu
uzb uz Uzbek
vie vi Vietnamese
xho xh Xhosa
yid yi Yiddish
zho zh Chinese
ace - Acehnese
arg an Aragonese
ary - Moroccan Arabic
arz - Egyptian Arabic
ast - Asturian
bak ba Bashkir
cmn zh Mandarin Chinese
crh - Crimean Tatar
ekk et Standard Estonian
fao fo Faroese
fil tl Filipino
grn gn Guarani
hat ht Haitian Creole
hbs sr Serbo-Croatian
ibo ig Igbo
kab - Kabyle
kin rw Kinyarwanda
lij - Ligurian
lin ln Lingala
ltz lb Luxembourgish
lug lg Ganda
lvs lv Standard Latvian
mlt mt Maltese
nno nn Norwegian Nynorsk
nob no Norwegian Bokmål
nso - Northern Sotho
oci oc Occitan
pcm - Nigerian Pidgin
pes fa Iranian Persian
que qu Quechua
sme se Northern Sami
sna sn Shona
sot st Southern Sotho
tat tt Tatar
tgk tg Tajik
tuk tk Turkmen
vec - Venetian
wln wa Walloon
wuu - Wu Chinese
yor yo Yoruba
yue - Cantonese
zsm ms Standard Malay
zul zu Zulu
"""


def _read() -> dict[str, tuple[str, str]]:
    rows = (line.split(maxsplit=2) for line in _TABLE.strip().splitlines())
    return {code: (code if short == "-" else short, name) for code, short, name in rows}


_LANGUAGES = _read()
LANGUAGE_CODES = tuple(sorted(_LANGUAGES))


def language_name(code: str) -> str:
    """English name of ``zho``, ``zho-CN`` or ``zho_Hans``; a code the table lacks stands for itself."""
    return _LANGUAGES[base_code(code)][1] if base_code(code) in _LANGUAGES else code


def short_code(code: str) -> str | None:
    """ISO 639-1 code, or the 639-3 code of a language that has none; None for one the table lacks."""
    known = _LANGUAGES.get(base_code(code))
    return known[0] if known else None


def long_code(short: str) -> str | None:
    """ISO 639-3 code of an ISO 639-1 code, of several the usual written form; None for one the table lacks."""
    return next((code for code, (own, _) in _LANGUAGES.items() if own == short), None)


def base_code(code: str) -> str:
    """The language of a code that may name a script or region after a hyphen or underscore."""
    return code.replace("_", "-").split("-", 1)[0].lower()


def check_languages(weights: Mapping[str, float]) -> None:
    """Raise ValueError naming the first unknown code, or a weight that is not above zero."""
    for code, weight in weights.items():
        if code not in _LANGUAGES:
            near = ", ".join(difflib.get_close_matches(code, LANGUAGE_CODES, n=3, cutoff=0.0))
            raise ValueError(
                f"{code!r} is no known language; allowed: one of {len(LANGUAGE_CODES)} ISO 639-3 codes such as eng, "
                f"deu, zho; the nearest are {near}"
            )
        if not weight > 0:
            raise ValueError(f"the weight of {code!r} is {weight:g}; allowed: above 0")
    if not weights:
        raise ValueError("no language is given; allowed: {code: weight, ...} with at least one")
