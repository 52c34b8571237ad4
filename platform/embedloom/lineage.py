"""``embedloom explain``: from the merged model back to the corpus, or from one row to what it was made from."""

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.errors import DataError
from embedloom.storage import Place

_FIXED = (
    "corpus", "encoder", "synthesis", "mining", "rescoring", "examples", "merged", "evaluation", "gate", "vectors",
)  # fmt: skip
_PREVIEW = 160  # characters of a text
_LISTED = 5  # pairs of a document, negatives of an example
# kind of row -> (artefact, folder) where such rows are
_TABLES = {
    "document": (("corpus", "documents/train"), ("corpus", "documents/dev"), ("corpus", "documents/test")),
    "pair": (
        ("corpus", "pairs/train"),
        ("corpus", "pairs/dev"),
        ("corpus", "pairs/test"),
        ("synthesis", "pairs"),
    ),
    "example": (("examples", "examples"),),
    "candidates": (("mining", "candidates"), ("rescoring", "candidates")),
    "reject": (
        ("corpus", "rejects"),
        ("synthesis", "rejects"),
        ("mining", "rejects"),
        ("examples", "rejects"),
    ),
}

Row = dict[str, Any]


def explain(run_place: Place, row_id: str | None) -> str:
    """Lineage of a run or of one of its rows, as text.

    Args:
        run_place: the run folder, ``runs/<name>``.
        row_id: id of a document, pair or example; None for the whole run.

    Raises:
        DataError: no finished artefact there, a corrupt manifest, or no row with this id.
    """
    artefacts = _artefacts(run_place)
    if not artefacts:
        raise DataError(
            f"{run_place.uri}: no finished artefact of a run here; expected folders such as {', '.join(_FIXED)}"
        )
    return "\n".join(
        _explain_run(artefacts) if row_id is None else _explain_row(run_place, artefacts, row_id)
    )


def _artefacts(run: Place) -> dict[str, Artefact]:
    trained = [name for candidate in run.names("training") for name in run.names(candidate)]
    names = [*_FIXED, *trained]
    return {name: Artefact.open(run.child(name)) for name in names if run.child(name).exists(MANIFEST_FILE)}


def _explain_run(artefacts: dict[str, Artefact]) -> Iterator[str]:
    """The tree of inputs below the merged model, or below whatever is furthest along without one."""
    used = {name for artefact in artefacts.values() for name in artefact.manifest["inputs"]}
    roots = ["merged"] if "merged" in artefacts else [name for name in artefacts if name not in used]
    shown: set[str] = set()
    for root in roots:
        yield from _tree(artefacts, root, None, "", shown)


def _tree(
    artefacts: dict[str, Artefact], name: str, expected: str | None, indent: str, shown: set[str]
) -> Iterator[str]:
    """One artefact and, below it, what it was made from; ``expected`` is the fingerprint its user recorded."""
    artefact = artefacts.get(name)
    if artefact is None:
        yield f"{indent}{name}  {expected}  no longer there"
        return
    if expected is not None and artefact.fingerprint != expected:
        yield f"{indent}{name}  {expected}  was rebuilt since, now {artefact.fingerprint}"
        return
    if name in shown:
        yield f"{indent}{name}  {artefact.fingerprint}  (see above)"
        return
    shown.add(name)
    yield f"{indent}{name}  {artefact.fingerprint}  {_facts(artefact)}"
    for parent, recorded in artefact.manifest["inputs"].items():
        yield from _tree(artefacts, parent, recorded, f"{indent}    ", shown)


def _facts(artefact: Artefact) -> str:
    manifest = artefact.manifest
    counts = {key: value for key, value in manifest["counts"].items() if not isinstance(value, dict | list)}
    details = {key: value for key, value in manifest["details"].items() if not isinstance(value, dict | list)}
    facts = [f"{key} {value}" for key, value in {**details, **counts}.items()]
    return ", ".join([*facts, f"built {manifest['created']}", f"config {manifest['config_fingerprint']}"])


def _explain_row(run: Place, artefacts: dict[str, Artefact], row_id: str) -> Iterator[str]:
    document = _find(artefacts, "document", row_id)
    pair = _find(artefacts, "pair", row_id)
    example = _find(artefacts, "example", row_id)
    reject = _find(artefacts, "reject", row_id)
    if not any((document, pair, example, reject)):
        raise DataError(f"{run.uri}: no document, pair or example has the id {row_id!r}")
    if pair is not None:
        document = document or _find(artefacts, "document", pair[1]["document_id"])
    if example is not None:
        yield from _describe_example(*example)
    if pair is not None:
        yield from _describe_pair(*pair)
        for where, row in _rows(artefacts, "candidates", pair[1]["id"], column="query_id"):
            yield from _describe_candidates(where, row)
    if document is not None:
        yield from _describe_document(*document)
        if pair is None:
            yield from _describe_uses(artefacts, row_id)
    if reject is not None:
        yield f"rejected  {row_id}  in {reject[0]}: {reject[1]['reason']} ({reject[1]['detail']})"


def _find(
    artefacts: dict[str, Artefact], kind: str, row_id: str, column: str = "id"
) -> tuple[str, Row] | None:
    """The first row with this id and the place it stands, ``corpus/pairs/train/part-000000.parquet:17``."""
    return next(_rows(artefacts, kind, row_id, column), None)


def _rows(artefacts: dict[str, Artefact], kind: str, row_id: str, column: str) -> Iterator[tuple[str, Row]]:
    for name, folder in _TABLES[kind]:
        if name not in artefacts:
            continue
        place = artefacts[name].place
        for file in place.names(folder, ".parquet"):
            hits = pc.equal(place.read_table(file, columns=[column]).column(column), row_id)
            positions = pc.indices_nonzero(hits).to_pylist()
            if positions:
                table = place.read_table(file)
                for position in positions:
                    yield f"{name}/{file}:{position}", table.slice(position, 1).to_pylist()[0]


def _describe_document(where: str, row: Row) -> Iterator[str]:
    yield f"document  {row['id']}  in {where}"
    yield f"    source       {row['source']}"
    if row.get("title"):
        yield f"    title        {_preview(row['title'])}"
    yield f"    text         {_preview(row['text'])}"


def _describe_uses(artefacts: dict[str, Artefact], document_id: str) -> Iterator[str]:
    pairs = list(_rows(artefacts, "pair", document_id, column="document_id"))
    yield f"    pairs        {len(pairs)}"
    for _, row in pairs[:_LISTED]:
        yield f"        {row['id']}  {row['origin']}  {_preview(row['query'])}"


def _describe_pair(where: str, row: Row) -> Iterator[str]:
    yield f"pair  {row['id']}  in {where}"
    yield f"    query        {_preview(row['query'])}"
    yield f"    instruction  {row['instruction']}"
    yield f"    origin       {row['origin']}, task type {row['task_type']}"
    if row.get("generator"):
        yield f"    generator    {row['generator']}, prompt {row['prompt_hash']}"
    yield f"    document     {row['document_id']}"


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


def _preview(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _PREVIEW else f"{line[: _PREVIEW - 1]}…"
