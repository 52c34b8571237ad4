"""How varied the rows are, measured on a sample in a Ray task: some thousand rows, those with the lowest ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.engines.tasks import run_tasks
from embedloom.retrieval.stored import stored_vectors
from embedloom.storage import Place
from embedloom.synthesis.diversity import measure
from embedloom.synthesis.refusals import Round

_SAMPLE = 10_000
_ASKED_VECTORS = "asked_vectors"
_DOCUMENT_VECTORS = "steps/document_vectors"


def measured_diversity(
    stage: str, place: Place, files: Sequence[str], rounds: Sequence[Round]
) -> dict[str, Any]:
    """``diversity.measure`` of the synthetic rows in these files; vectors count where a round trip made them."""
    (found,) = run_tasks(stage, _measure, [tuple(files)], tuple(rounds), place, cpus=1.0)
    return found


def _measure(files: Sequence[str], rounds: Sequence[Round], place: Place) -> dict[str, Any]:
    sample = _lowest(place, files)
    texts: dict[str, list[str]] = {}
    ordered: list[dict[str, Any]] = []
    for name in sorted({row["generator"] for row in sample}):
        own = [row for row in sample if row["generator"] == name]
        texts[name] = [row["query"] for row in own]
        ordered += own
    if not texts:
        return {}
    queries = [name for one in rounds for name in place.names(f"{one.folder}/{_ASKED_VECTORS}", ".parquet")]
    if not queries:
        return measure(texts)
    by_id = _vectors(place, queries, [row["id"] for row in ordered])
    vectors = np.stack([by_id[row["id"]] for row in ordered if row["id"] in by_id])
    documents = place.names(_DOCUMENT_VECTORS, ".parquet")
    names = _lowest_ids(place, documents)
    corpus = _vectors(place, documents, names)
    read = {row["document_id"] for row in ordered}
    seeds = [number for number, name in enumerate(names) if name in read]
    return measure(texts, vectors, np.stack([corpus[name] for name in names]), seeds)


def _lowest(place: Place, files: Sequence[str]) -> list[dict[str, Any]]:
    """The synthetic rows with the lowest ids, in their order."""
    kept = None
    for file in files:
        table = place.read_table(file, ["id", "query", "document_id", "generator"])
        table = table.filter(pc.is_valid(table.column("generator")))
        kept = table if kept is None else pa.concat_tables([kept, table])
        kept = kept.take(pc.sort_indices(kept, [("id", "ascending")])).slice(0, _SAMPLE)
    return [] if kept is None else list(kept.to_pylist())


def _lowest_ids(place: Place, files: Sequence[str]) -> list[str]:
    found: list[str] = []
    for file in files:
        found = sorted([*found, *place.read_table(file, ["id"]).column("id").to_pylist()])[:_SAMPLE]
    return found


def _vectors(place: Place, files: Sequence[str], ids: Sequence[str]) -> dict[str, Any]:
    wanted = pa.array(ids, pa.string())
    found: dict[str, Any] = {}
    for file in files:
        table = place.read_table(file, ["id", "vector"])
        table = table.filter(pc.is_in(table.column("id"), value_set=wanted))
        found.update(zip(table.column("id").to_pylist(), stored_vectors(table, file), strict=True))
    return found
