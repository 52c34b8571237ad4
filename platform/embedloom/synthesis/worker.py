"""The actor of the stage: one LLM, a shard of documents in, pairs and rejects out."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from embedloom.config.data import SynthesisConfig
from embedloom.engines.protocol import EngineFactory, GenerationRequest, GenerationResult
from embedloom.instructions import document_text
from embedloom.records import content_id, table_from_rows
from embedloom.synthesis.parse import Reject, parse_queries
from embedloom.synthesis.prompt import Prompt

PAIRS_FOLDER = "pairs"
REJECTS_FOLDER = "rejects"
# Counted per shard in the file's own metadata, so a resumed run sums them without generating anything again.
COUNT_KEYS = ("documents", "prompt_tokens", "output_tokens")
DEFAULT_LANG = "eng"

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides a generator's rows, apart from its weights."""

    generator: str
    seed: int
    prompt: Prompt
    config: SynthesisConfig

    @property
    def instruction(self) -> str:
        """The training instruction of the pairs."""
        return self.config.instruction or self.prompt.instruction


class SynthesisWorker:
    """Builds its engine once, then turns shard after shard of documents into pairs."""

    def __init__(
        self, engine_factory: EngineFactory, engine_arguments: dict[str, Any], recipe: Recipe
    ) -> None:
        self._engine = engine_factory(**engine_arguments)
        self._recipe = recipe

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Ask for the queries of one shard's documents."""
        documents = rows.to_pylist()
        requests = [build_request(document, self._recipe) for document in documents]
        results = self._engine.generate(requests)
        pairs: list[Row] = []
        rejects: list[Row] = []
        for document, result in zip(documents, results, strict=True):
            found, refused = build_rows(document, result, self._recipe)
            pairs.extend(found)
            rejects.extend(refused)
        counts = Counter(
            documents=len(documents),
            prompt_tokens=sum(result.prompt_tokens for result in results),
            output_tokens=sum(result.output_tokens for result in results),
        )
        metadata = {key: str(counts[key]) for key in COUNT_KEYS}
        return {
            REJECTS_FOLDER: table_from_rows("rejects", rejects),
            PAIRS_FOLDER: table_from_rows("pairs", pairs).replace_schema_metadata(metadata),
        }


def pair_id(document_id: str, recipe: Recipe, number: int) -> str:
    """Id of a document's query; known before the query is, so a rerun gives the same ids."""
    return content_id(document_id, recipe.generator, recipe.prompt.hash, str(number))


def build_request(document: dict[str, Any], recipe: Recipe) -> GenerationRequest:
    """One request for all queries of a document, with a sampling seed of its own."""
    config = recipe.config
    identity = pair_id(document["id"], recipe, 0)
    digest = hashlib.sha256(f"{recipe.seed}:{identity}".encode()).digest()
    return GenerationRequest(
        id=identity,
        messages=recipe.prompt.render(
            shown_text(document, config.max_document_characters),
            document["title"] or "",
            document["lang"] or DEFAULT_LANG,
            config.queries_per_document,
        ),
        seed=int.from_bytes(digest[:8], "little") & 0x7FFFFFFF,  # engines take 31 bits
        max_tokens=config.max_new_tokens,
        temperature=config.sampling_temperature,
        top_p=config.top_p,
        json_schema=recipe.prompt.answer_schema(config.queries_per_document, config.max_query_characters),
    )


def shown_text(document: dict[str, Any], max_characters: int) -> str:
    """The document's text up to the last blank before the limit; one long word is cut inside."""
    text = document_text(document["title"], document["text"])
    if len(text) <= max_characters:
        return text
    head = text[:max_characters]
    return head if text[max_characters].isspace() else (head.rsplit(maxsplit=1) or [""])[0] or head


def build_rows(
    document: dict[str, Any], result: GenerationResult, recipe: Recipe
) -> tuple[list[Row], list[Row]]:
    """(pairs, rejects) of one document; together as many as queries were asked for."""
    config = recipe.config
    outcomes = parse_queries(
        result,
        config.queries_per_document,
        shown_text(document, config.max_document_characters),
        [message.content for message in recipe.prompt.templates(config.queries_per_document)],
        config.max_query_characters,
    )
    lang = document["lang"] or DEFAULT_LANG
    pairs: list[Row] = []
    rejects: list[Row] = []
    for number, outcome in enumerate(outcomes):
        identity = pair_id(document["id"], recipe, number)
        if isinstance(outcome, Reject):
            rejects.append({"id": identity, "reason": outcome.reason, "detail": outcome.detail})
            continue
        pairs.append(
            {
                "id": identity,
                "query": outcome,
                "document_id": document["id"],
                "task_type": recipe.prompt.task_type,
                "instruction": recipe.instruction,
                "lang": lang,
                "document_lang": lang,
                "origin": "synthetic",
                "generator": recipe.generator,
                "prompt_hash": recipe.prompt.hash,
            }
        )
    return pairs, rejects
