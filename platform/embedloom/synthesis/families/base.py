"""The protocol of a family: what it asks an LLM, which rows it makes of the answer, and how an engine's text is read as one."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import jsonschema

from embedloom.compute.generation import ENGINE_CUT, GenerationResult
from embedloom.config.synthesis import FamilyConfig
from embedloom.core.schemas import content_id
from embedloom.core.text import hash64
from embedloom.synthesis.prompt import Prompt, PromptRules

# The protocol of a family: what it asks an LLM, and which rows it makes of the answer. Pure; engines stay outside.
#
# An attempt is one request. Everything that varies in it (persona, length, target score, ...) is drawn by hash from
# its seed, so that the same attempt is the same request in every run.


Source = Literal["documents", "tasks", "pairs", "none"]
Row = dict[str, object]  # a row of the pairs schema, see records.SCHEMAS
DETAIL_CHARACTERS = 200
# Control characters, and lone surrogates, which no file can hold.
_REFUSED_CATEGORIES = ("Cc", "Cs")

Options = TypeVar("Options", bound=FamilyConfig, contravariant=True)


@dataclass(frozen=True, slots=True)
class SeedDocument:
    """A document of the corpus, as an attempt reads it."""

    id: str
    title: str | None
    text: str
    lang: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request of a family to a generator; which of document, task and pair is set, its ``source`` says.

    Attributes:
        id: content hash, known before anything is generated.
        family: key of its section (FamilyConfig.key).
        generator: the LLM that is asked; empty where none is.
        ordinal: number within its cell of generator, family and language.
        language: ISO 639-3 code of the query to write.
        document_language: of the text on the other side.
        seed: 64 bits; decides every drawn attribute and the sampling.
        document: a seed document.
        task: sentence brainstormed in step 1.
        pair: a row of the pairs schema with ``positive`` filled in.
    """

    id: str
    family: str
    generator: str
    ordinal: int
    language: str
    document_language: str
    seed: int
    document: SeedDocument | None = None
    task: str | None = None
    pair: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What an engine is sent: chat messages and the JSON schema of the answer."""

    messages: tuple[dict[str, str], ...]
    json_schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was asked for and is not kept; ``reason`` is one of ``rejects.REASONS``."""

    reason: str
    detail: str


class Family(Protocol[Options]):
    """One kind of synthetic pair."""

    name: str
    task_type: str
    source: Source
    extracts: (
        bool  # rows are read out of the document, no LLM is asked; use ``extract``, not ``ask`` and ``rows``
    )

    def own_prompt(self, options: Options) -> tuple[str, PromptRules]:
        """Its own prompt, a file of synthesis/prompts with a variant ``<name>_small``, and what prompts may hold."""
        ...

    def asked_rows(self, options: Options) -> int:
        """Rows and rejects that one attempt gives, always this many."""
        ...

    def ask(self, attempt: Attempt, prompt: Prompt, options: Options) -> Ask:
        """The request of an attempt."""
        ...

    def rows(
        self, attempt: Attempt, answer: Mapping[str, Any], prompt: Prompt, options: Options
    ) -> list[Row | Reject]:
        """Rows of an answer that fits ``ask().json_schema``; ``asked_rows`` items, in the order of the answer."""
        ...


@runtime_checkable
class ExtractingFamily(Protocol[Options]):
    """A family whose rows stand in the documents already."""

    def extract(self, attempt: Attempt, options: Options) -> list[Row | Reject]:
        """Rows found in ``attempt.document``; fewer than ``asked_rows`` where it has fewer, then one reject."""
        ...


def row_id(attempt: Attempt, number: int) -> str:
    """Id of an attempt's row or reject; known before its text, so a rerun gives the same ids."""
    return content_id(attempt.id, str(number))


def draw(seed: int, name: str, choices: Sequence[str]) -> str:
    """One of the choices, each equally likely, by a hash of the seed and the attribute's name."""
    return choices[hash64(f"{seed}:{name}") % len(choices)]


def drawn(attempt: Attempt, prompt: Prompt) -> dict[str, str]:
    """The attempt's value of each attribute that the prompt samples."""
    return {name: draw(attempt.seed, name, choices) for name, choices in prompt.attributes.items()}


def positive_id(text: str) -> str:
    """Document id of a positive that was written and stands in no corpus."""
    return content_id("synthetic", text)


def clean(value: str, limit: int, paragraphs: bool = False) -> str | Reject:
    """The text with blanks collapsed, or why it cannot be used.

    Args:
        value: as the LLM wrote it.
        limit: most characters that are kept.
        paragraphs: keep line breaks, as a document has them.
    """
    lines = value.splitlines() if paragraphs else [value]
    text = "\n".join(filter(None, (" ".join(line.split()) for line in lines)))
    if any(unicodedata.category(one) in _REFUSED_CATEGORIES for one in text.replace("\n", " ")):
        return reject("unusable_characters", ascii(text))
    if not any(one.isalpha() for one in text):
        return reject("empty", text)
    return reject("too_long", text) if len(text) > limit else text


def cut(text: str, max_characters: int) -> str:
    """The text up to the last blank before the limit; one long word is cut inside."""
    if len(text) <= max_characters:
        return text
    head = text[:max_characters]
    return head if text[max_characters].isspace() else (head.rsplit(maxsplit=1) or [""])[0] or head


def clean_fields(
    answer: Mapping[str, Any], limits: Mapping[str, int], paragraphs: Sequence[str] = ()
) -> dict[str, str] | Reject:
    """Every field of ``limits`` cleaned, or the first one's problem."""
    found: dict[str, str] = {}
    for field, limit in limits.items():
        text = clean(answer[field], limit, field in paragraphs)
        if isinstance(text, Reject):
            return Reject(text.reason, f"{field}: {text.detail}"[:DETAIL_CHARACTERS])
        found[field] = text
    return found


def reject(reason: str, detail: str) -> Reject:
    """A reject with its detail cut to what a reader needs."""
    return Reject(reason, detail[:DETAIL_CHARACTERS])


def synthetic_row(
    attempt: Attempt,
    number: int,
    prompt: Prompt,
    *,
    query: str,
    task_type: str,
    instruction: str,
    document_id: str | None = None,
    positive: str | None = None,
    negatives: Sequence[str] | None = None,
) -> Row:
    """A row of the pairs schema; a positive without ``document_id`` gets an id of its own."""
    if document_id is None:
        if positive is None:
            raise ValueError("synthetic_row needs a document_id or a positive")
        document_id = positive_id(positive)
    return {
        "id": row_id(attempt, number),
        "query": query,
        "document_id": document_id,
        "positive": positive,
        "negatives": list(negatives) if negatives else None,
        "task_type": task_type,
        "instruction": instruction,
        "lang": attempt.language,
        "document_lang": attempt.document_language,
        "origin": "synthetic",
        "generator": attempt.generator,
        "prompt_hash": prompt.hash,
        "attributes": json.dumps(drawn(attempt, prompt), ensure_ascii=False, sort_keys=True),
    }


# From an engine's text to JSON of the asked shape, or a reject.


def read_json(result: GenerationResult, ask: Ask) -> dict[str, Any] | Reject:
    """The answer, checked against the schema it was asked for.

    An engine that constrains its output is checked too: grammars have bugs, and not every engine has them.
    """
    if result.error is not None:
        return reject("engine_error", result.error)
    try:
        answer = json.loads(result.text)
    except ValueError:
        return reject("truncated" if result.finish_reason == ENGINE_CUT else "invalid_json", result.text)
    try:
        jsonschema.validate(answer, ask.json_schema)
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        return reject("schema", f"{where or 'answer'}: {error.message}")
    checked: dict[str, Any] = answer
    return checked
