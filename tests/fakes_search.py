"""A small vectors artefact for tests of searches."""

import numpy as np
import pyarrow as pa

from embedloom.config.embedding import EmbeddingConfig, IndexConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.storage import Place
from embedloom.retrieval.embed import vector_table
from embedloom.retrieval.index import build_index
from embedloom.retrieval.inputs import open_input
from embedloom.retrieval.ledger import open_ledger
from fakes_serving import FakeEncoder

ENCODER = FakeEncoder(limit=128)
HASH = ENCODER.contract.hash


def artefact(folder, texts, *, index=None, model="f00d", side="document", dimensions=None) -> Place:
    """A vectors artefact as `embedloom embed` leaves it, by its own ledger, with vectors of the fake encoder."""
    source_file = folder / "in.parquet"
    folder.mkdir(exist_ok=True)
    ids = [f"d{number:02d}" for number in range(len(texts))]
    Place(str(folder)).write_table(
        "in.parquet", pa.table({"id": ids, "title": ["T"] * len(ids), "text": texts})
    )
    place = Place(str(folder / "vectors"))
    writer = ArtefactWriter(place, "vectors", "c", {"corpus": "x"}, "local")
    ledger = open_ledger(open_input(str(source_file), EmbeddingConfig(), place), place, 8, None)
    vectors = ENCODER.embed([f"T {text}" for text in texts], "document")
    if dimensions:
        vectors = vectors[:, :dimensions] / np.linalg.norm(vectors[:, :dimensions], axis=1, keepdims=True)
    start = 0
    for part, rows in zip(ledger.parts, ledger.rows, strict=True):
        table = vector_table(ids[start : start + rows], vectors[start : start + rows], HASH, model, 1)
        place.write_table(f"vectors/{part}", table)
        start += rows
    if index:
        build_index(IndexConfig(kind=index, sample=10), place, HASH)
    recipe = {"side": side, "dimensions": dimensions}
    writer.commit({"rows": len(ids)}, {"contract_hash": HASH, "model_id": model, "recipe": recipe})
    return place
