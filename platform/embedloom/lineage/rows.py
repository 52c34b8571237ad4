"""One row: what it is, where it stands, and the rows it was made from."""

from collections.abc import Iterator
from typing import Any

from embedloom.artefacts import Artefact
from embedloom.errors import DataError
from embedloom.lineage.read import Row, first_row, rows_with
from embedloom.lineage.tree import code_of
from embedloom.storage import Place

_PREVIEW = 160  # characters of a text
_LISTED = 5  # pairs of a document, negatives of an example


def explain_row(run: Place, artefacts: dict[str, Artefact], row_id: str) -> Iterator[str]:
    """Lines about a vector, document, pair, example or refused row.

    Raises:
        DataError: no such row.
    """
    vector = first_row(artefacts, "vector", row_id)
    document = first_row(artefacts, "document", row_id)
    pair = first_row(artefacts, "pair", row_id)
    example = first_row(artefacts, "example", row_id)
    reject = first_row(artefacts, "reject", row_id)
    if not any((vector, document, pair, example, reject)):
        raise DataError(f"{run.uri}: no document, pair or example has the id {row_id!r}")
    if pair is not None:
        document = document or first_row(artefacts, "document", pair[1]["document_id"])
    if vector is not None:
        yield from _describe_vector(artefacts, *vector)
    if example is not None:
        yield from _describe_example(*example)
    if pair is not None:
        yield from _describe_pair(artefacts, *pair)
        for where, row in rows_with(artefacts, "candidates", pair[1]["id"], column="query_id"):
            yield from _describe_candidates(where, row)
    if document is not None:
        yield from _describe_document(artefacts, *document)
        if pair is None:
            yield from _describe_uses(artefacts, row_id)
    if reject is not None:
        yield f"rejected  {row_id}  in {reject[0]}: {reject[1]['reason']} ({reject[1]['detail']})"


def _describe_vector(artefacts: dict[str, Artefact], where: str, row: Row) -> Iterator[str]:
    """The vector, and the model that made it, back to its candidates."""
    details = artefacts["vectors"].manifest["details"]
    yield f"vector  {row['id']}  in {where}"
    yield f"    dimensions   {len(row['vector'])}, contract {details.get('contract_hash')}, {_made(artefacts, where)}"
    model_id = details.get("model_id")
    maker = next((name for name, one in artefacts.items() if one.fingerprint == model_id), None)
    yield f"    model        {maker or 'none of this run'} {model_id}"
    for parent, fingerprint in artefacts[maker].manifest["inputs"].items() if maker else ():
        found = artefacts.get(parent)
        counts = found.counts if found is not None and found.fingerprint == fingerprint else {}
        facts = ", ".join(
            f"{key} {counts[key]:,}"
            for key in ("steps", "rows", "tokens")
            if isinstance(counts.get(key), int)
        )
        yield f"        made from {parent} {fingerprint}{f', {facts}' if facts else ''}"


def _describe_document(artefacts: dict[str, Artefact], where: str, row: Row) -> Iterator[str]:
    yield f"document  {row['id']}  in {where}"
    yield f"    source       {row['source']}"
    if row.get("title"):
        yield f"    title        {_preview(row['title'])}"
    yield f"    text         {_preview(row['text'])}"
    yield f"    made by      {_made(artefacts, where)}"


def _describe_uses(artefacts: dict[str, Artefact], document_id: str) -> Iterator[str]:
    pairs = list(rows_with(artefacts, "pair", document_id, column="document_id"))
    yield f"    pairs        {len(pairs)}"
    for _, row in pairs[:_LISTED]:
        by = f" by {row['generator']}, prompt {row['prompt_hash']}" if row.get("generator") else ""
        yield f"        {row['id']}  {row['origin']}{by}  {_preview(row['query'])}"


def _describe_pair(artefacts: dict[str, Artefact], where: str, row: Row) -> Iterator[str]:
    yield f"pair  {row['id']}  in {where}"
    yield f"    query        {_preview(row['query'])}"
    yield f"    instruction  {row['instruction']}"
    yield f"    origin       {row['origin']}, task type {row['task_type']}"
    if row.get("generator"):
        yield f"    generator    {row['generator']}, prompt {row['prompt_hash']}{_prompt_of(artefacts, row)}"
    yield f"    document     {row['document_id']}"
    yield f"    made by      {_made(artefacts, where)}"


def _prompt_of(artefacts: dict[str, Artefact], row: Row) -> str:
    """Families whose prompt has the row's hash."""
    prompts: Any = (
        artefacts["synthesis"].manifest["details"].get("prompts") if "synthesis" in artefacts else None
    )
    rows = prompts.get("rows", {}) if isinstance(prompts, dict) else {}
    names = [key for key, value in rows.get(row["generator"], {}).items() if value == row["prompt_hash"]]
    return f" of {', '.join(names)}" if names else ""


def _describe_candidates(where: str, row: Row) -> Iterator[str]:
    yield f"candidates  in {where}"
    yield f"    teacher      {row['teacher']}, contract {row['contract_hash']}, {len(row['document_ids'])} kept"
    for document_id, score in list(zip(row["document_ids"], row["scores"], strict=True))[:_LISTED]:
        yield f"        {score:.5f}  {document_id}"


def _describe_example(where: str, row: Row) -> Iterator[str]:
    yield f"example  {row['id']}  in {where}"
    yield f"    query        {_preview(row['query'])}"
    yield f"    dataset      {row['dataset']}, task type {row['task_type']}"
    yield f"    positive     {row['positive_score']:.5f}  {_preview(row['positive'])}"
    for score, text in list(zip(row["negative_scores"], row["negatives"], strict=True))[:_LISTED]:
        yield f"    negative     {score:.5f}  {_preview(text)}"


def _made(artefacts: dict[str, Artefact], where: str) -> str:
    """The artefact a row stands in: fingerprint, settings and code."""
    artefact = artefacts[where.split("/")[0]]
    return f"{where.split('/')[0]} {artefact.fingerprint}, config {artefact.manifest['config_fingerprint']}, {code_of(artefact)}"


def _preview(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _PREVIEW else f"{line[: _PREVIEW - 1]}…"
