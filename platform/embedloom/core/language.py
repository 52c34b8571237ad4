"""Which language a text is in, by py3langid: its model lies inside the wheel (4.6 MB, 140 languages, no download)."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from embedloom.core.text import long_code

MIN_LETTERS = 20  # the detector errs on shorter texts
_JUDGED_CHARACTERS = 1000  # more tell nothing new


def language_of(texts: Sequence[str]) -> str | None:
    """ISO 639-3 code of the language that most of the texts are in; None where fewer than two thirds agree.

    Texts of fewer letters than ``MIN_LETTERS`` are passed over.
    """
    model, _ = language_model()
    judged = [text for text in texts if sum(map(str.isalpha, text)) >= MIN_LETTERS]
    found = Counter(str(model.classify(text[:_JUDGED_CHARACTERS])[0]) for text in judged)
    if not found:
        return None
    label, count = found.most_common(1)[0]
    return long_code(label) if 3 * count >= 2 * len(judged) else None


@lru_cache(maxsize=1)
def language_model() -> tuple[LanguageIdentifier, frozenset[str]]:
    """The detector and its labels, ISO 639-1; loaded once a process, takes about a second."""
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return model, frozenset(str(label) for label in model.nb_classes)
