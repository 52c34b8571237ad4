"""Whether a text is in the language that was asked for.

py3langid, because its model lies inside the wheel (4.6 MB, 140 languages, no download), its import is light and a
call takes 50 microseconds; fastText's and lingua's models are downloads or a hundred megabytes. Its weakness is
short text and close relatives, so only a confident verdict for another, unrelated language refuses a text. Of 7,025
queries of tldr pages (38 languages) and Natural Questions it refused none; with a wrong language it refused 64 % of
the tldr queries, which are half a dozen words long.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from embedloom.config.languages import long_code, short_code
from embedloom.config.quality import LanguageCheck
from embedloom.synthesis.families.base import Reject, reject

# Languages that a short text does not tell apart; a verdict for one of a group is no verdict against another.
_CLOSE = (
    {"bs", "hr", "sr", "sh"},
    {"id", "ms", "jv", "ace", "su"},
    {"no", "nb", "nn", "da", "fo"},
    {"zh", "wuu", "yue"},
    {"ar", "ary", "arz"},
    {"cs", "sk"},
    {"be", "ru", "uk"},
    {"es", "gl", "pt", "ca", "ast", "an", "oc"},
    {"fa", "ur", "ps"},
    {"en", "pcm"},
    {"de", "lb"},
    {"nl", "af", "fy"},
    {"fr", "gcr", "gcf", "wa"},
    {"it", "vec", "lij", "la"},
    {"tr", "az", "tk", "crh", "gag"},
    {"hi", "mr", "ne", "sa", "gom"},
    {"uz", "uzs"},
    {"zu", "xh"},
    {"lv", "ltg"},
    {"ku", "sdh"},
    {"kk", "ky", "tt", "ba"},
    {"gn", "gug"},
    {"he", "hbo", "yi"},
    {"el", "grc"},
    {"rn", "rw"},
    {"nso", "st", "tn"},
    {"ga", "gd"},
    {"mk", "bg"},
)
_NO_LANGUAGE = "zxx"
_JUDGED_CHARACTERS = 1000  # more tell nothing new


def language_problem(text: str, language: str, check: LanguageCheck) -> Reject | None:
    """A reject if the text is surely in another language; None if it fits, is short, or cannot be judged.

    Args:
        text: what was written.
        language: ISO 639-3 code asked for; one the model does not know cannot be judged.
        check: letters below which nothing is judged, and the probability of another language that refuses.
    """
    expected = short_code(language)
    model, known = _model()
    if expected not in known or sum(character.isalpha() for character in text) < check.min_letters:
        return None
    ranked = [(str(label), float(probability)) for label, probability in model.rank(text)]
    found = ranked[0][0]
    if found == _NO_LANGUAGE or _close(found, expected):
        return None
    # Arabic shares its probability with two of its dialects; together they speak for the group.
    probability = sum(share for label, share in ranked if _close(label, found))
    if probability < check.min_probability:
        return None
    return reject("language", f"{found} with {probability:.2f}, not {expected}: {text}")


def language_of(texts: Sequence[str]) -> str | None:
    """ISO 639-3 code of the language that most of the texts are in; None where fewer than two thirds agree.

    Texts with fewer letters than the default check judges are passed over.
    """
    model, _ = _model()
    judged = [text for text in texts if sum(map(str.isalpha, text)) >= LanguageCheck().min_letters]
    found = Counter(str(model.classify(text[:_JUDGED_CHARACTERS])[0]) for text in judged)
    if not found:
        return None
    label, count = found.most_common(1)[0]
    return long_code(label) if 3 * count >= 2 * len(judged) else None


def _close(found: str, expected: str) -> bool:
    return found == expected or any(found in group and expected in group for group in _CLOSE)


@lru_cache(maxsize=1)
def _model() -> tuple[LanguageIdentifier, frozenset[str]]:
    """Loaded once a process; takes about a second."""
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return model, frozenset(str(label) for label in model.nb_classes)
