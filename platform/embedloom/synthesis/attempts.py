"""Attempts as rows of a table: what a shard of work holds, one row per request of a family to a generator."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from embedloom.ngrams import hash64
from embedloom.records import content_id
from embedloom.synthesis.families.base import Attempt, SeedDocument

ATTEMPT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("family", pa.string()),
        ("generator", pa.string()),
        ("ordinal", pa.int64()),
        ("language", pa.string()),
        ("document_language", pa.string()),
        ("seed", pa.uint64()),
        ("document_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("lang", pa.string()),
        ("task", pa.string()),
        ("pair", pa.string()),  # JSON of a row of the pairs schema
    ]
)
DEFAULT_LANG = "eng"  # of a document whose corpus does not say


def attempt_row(
    *,
    seed: int,
    family: str,
    generator: str,
    ordinal: int,
    language: str,
    document_language: str,
    prompt_hash: str,
    document: Mapping[str, Any] | None = None,
    task: str | None = None,
    pair: Mapping[str, Any] | None = None,
) -> dict[str, object]:
    """A row of ATTEMPT_SCHEMA; its id says everything that decides what is asked, its seed everything drawn.

    Args:
        seed: of the run.
        family: key of its section, or of the task list.
        generator: the LLM; empty where none is asked.
        ordinal: number within its cell.
        language: of the query.
        document_language: of the other side.
        prompt_hash: of the prompt; empty where none is used.
        document: a row of the documents schema.
        task: a brainstormed sentence.
        pair: a row of the pairs schema.
    """
    source = str((document or pair or {}).get("id", task or ""))
    identity = content_id(
        "attempt",
        str(seed),
        family,
        generator,
        language,
        document_language,
        str(ordinal),
        prompt_hash,
        source,
    )
    return {
        "id": identity,
        "family": family,
        "generator": generator,
        "ordinal": ordinal,
        "language": language,
        "document_language": document_language,
        "seed": hash64(f"{seed}:{identity}"),
        "document_id": document["id"] if document else None,
        "title": document["title"] if document else None,
        "text": document["text"] if document else None,
        "lang": (document["lang"] or DEFAULT_LANG) if document else None,
        "task": task,
        "pair": None if pair is None else json.dumps(pair, ensure_ascii=False),
    }


def attempt_table(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Rows of ``attempt_row`` as a table."""
    return pa.Table.from_pylist(list(rows), schema=ATTEMPT_SCHEMA)


def read_attempts(table: pa.Table) -> list[Attempt]:
    """The attempts of a table; other columns do not matter."""
    return [
        Attempt(
            id=row["id"],
            family=row["family"],
            generator=row["generator"],
            ordinal=row["ordinal"],
            language=row["language"],
            document_language=row["document_language"],
            seed=row["seed"],
            document=None
            if row["document_id"] is None
            else SeedDocument(row["document_id"], row["title"], row["text"], row["lang"]),
            task=row["task"],
            pair=None if row["pair"] is None else json.loads(row["pair"]),
        )
        for row in table.select(ATTEMPT_SCHEMA.names).to_pylist()
    ]


def weighted(weights: Mapping[str, float], number: int) -> str:
    """The key that a 64-bit number falls on when the keys share the numbers out by weight."""
    point = number / 2**64 * sum(weights.values())
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return next(reversed(list(weights)))
