"""From what an engine wrote to queries, each accepted or refused with a named reason. Pure."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from embedloom.engines.protocol import ENGINE_CUT, GenerationResult
from embedloom.synthesis.prompt import answer_key

REJECT_REASONS = (
    "engine_error",  # the engine refused the request: the prompt was too long, or it failed on it
    "truncated",  # max_new_tokens ended the answer before its JSON did
    "invalid_json",  # not JSON, or a text of control characters
    "missing_field",  # no such key, not text, or fewer queries than asked for
    "empty",  # no letter in it
    "too_long",  # above max_query_characters, or cut off by that bound
    "copies_document",  # stands in the document word for word
    "echoes_prompt",  # repeats what the prompt says
    "duplicate",  # a query of the same document once more
)
_REFUSED_CATEGORIES = ("Cc", "Cs")  # control characters, and lone surrogates, which no file can hold
_DETAIL_CHARACTERS = 200
_ECHO_CHARACTERS = 20  # a template line shorter than this may stand in a query by chance


@dataclass(frozen=True, slots=True)
class Reject:
    """A query that was asked for and is not kept."""

    reason: str
    detail: str


def parse_queries(
    result: GenerationResult, count: int, document: str, templates: Sequence[str], max_characters: int
) -> list[str | Reject]:
    """Read ``count`` queries out of one answer.

    Args:
        result: what the engine returned.
        count: queries asked for.
        document: text the engine was shown.
        templates: the prompt's own texts, placeholders unfilled.
        max_characters: longest query that is kept.

    Returns:
        ``count`` items in the order of the answer; blanks inside a query are collapsed.
    """
    answer = _read_answer(result, count)
    if isinstance(answer, Reject):
        return [answer] * count
    outcomes: list[str | Reject] = []
    seen: set[str] = set()
    for value in answer:
        outcome = _check_query(value, document, templates, max_characters)
        if isinstance(outcome, str):
            key = _plain(outcome)
            if key in seen:
                outcome = _reject("duplicate", outcome)
            seen.add(key)
        outcomes.append(outcome)
    missing = _reject("missing_field", f"{len(answer)} of {count} queries: {result.text}")
    return outcomes + [missing] * (count - len(outcomes))


def _read_answer(result: GenerationResult, count: int) -> list[object] | Reject:
    """Up to ``count`` raw values of the answer's key."""
    if result.error is not None:
        return _reject("engine_error", result.error)
    try:
        answer = json.loads(result.text)
    except ValueError:
        return _reject("truncated" if result.finish_reason == ENGINE_CUT else "invalid_json", result.text)
    key = answer_key(count)
    if not isinstance(answer, dict) or key not in answer:
        return _reject("missing_field", result.text)
    value = answer[key]
    if count == 1:
        return [value]
    return value[:count] if isinstance(value, list) else _reject("missing_field", result.text)


def _check_query(value: object, document: str, templates: Sequence[str], max_characters: int) -> str | Reject:
    if not isinstance(value, str):
        return _reject("missing_field", json.dumps(value))
    query = " ".join(value.split())
    if any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in query):
        return _reject("invalid_json", ascii(query))
    if not any(character.isalpha() for character in query):
        return _reject("empty", query)
    if len(query) > max_characters:
        return _reject("too_long", query)
    plain = _plain(query)
    if plain in _plain(document):
        return _reject("copies_document", query)
    for line in (_plain(line) for template in templates for line in template.splitlines()):
        if plain in line or (len(line) >= _ECHO_CHARACTERS and line in plain):
            return _reject("echoes_prompt", query)
    return query


def _plain(text: str) -> str:
    """Lower-case words without the punctuation around the whole, for comparing."""
    return " ".join(text.casefold().split()).strip(" .?!\"'")


def _reject(reason: str, detail: str) -> Reject:
    return Reject(reason, detail[:_DETAIL_CHARACTERS])
