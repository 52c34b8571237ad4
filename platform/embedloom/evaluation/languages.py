"""Languages as mteb names them: ISO 639-3 and a script, ``eng-Latn``."""

import json
from functools import cache
from importlib import resources

UNKNOWN_LANGUAGE = "und-Zyyy"
_CODE_LENGTH = 8  # of "eng-Latn"
_REGION_SCRIPTS = {"zho-TW": "Hant", "zho-HK": "Hant"}


def language_code(lang: str | None) -> str:
    """mteb's code of a language: ``en``, ``eng`` and ``eng-GB`` give ``eng-Latn``; what is unknown ``und-Zyyy``.

    Scripts are the ones that mteb's own tasks use most for a language.
    """
    if lang is None:
        return UNKNOWN_LANGUAGE
    if len(lang) == _CODE_LENGTH and lang[3] == "-" and lang[4].isupper() and lang[5:].islower():
        return lang
    base = lang.split("-")[0].lower()
    code = _table("iso_639_1_to_3.json").get(base, base)
    code = "nob" if code == "nor" else code  # mteb's tasks tell Bokmål from Nynorsk
    script = _REGION_SCRIPTS.get(lang) or _table("iso_639_3_to_default_script.json").get(code)
    return f"{code}-{script}" if script else UNKNOWN_LANGUAGE


def same_language(one: str, other: str) -> bool:
    """Whether two codes name one language, whatever their script or region."""
    return language_code(one)[:3] == language_code(other)[:3] != UNKNOWN_LANGUAGE[:3] or one == other


@cache
def _table(name: str) -> dict[str, str]:
    """A table that mteb ships."""
    content: dict[str, str] = json.loads(resources.files("mteb.languages").joinpath(name).read_text("utf-8"))
    return content
