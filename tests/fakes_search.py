"""A small vectors artefact for tests of searches."""

import numpy as np
import pyarrow as pa

from embedloom.compute.shards import run_here
from embedloom.config.cluster import PoolConfig
from embedloom.config.embedding import EmbeddingConfig, IndexConfig, LexicalConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.storage import Place
from embedloom.retrieval.embed import vector_table
from embedloom.retrieval.index import build_index
from embedloom.retrieval.inputs import open_input
from embedloom.retrieval.ledger import open_ledger
from embedloom.retrieval.lexical import build_lexical
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


def with_words(folder, texts, index=None) -> Place:
    """The same as `embedloom embed --lexical` leaves it."""
    place = artefact(folder, texts, index=index)
    source = open_input(str(folder / "in.parquet"), EmbeddingConfig(), place)
    ledger = open_ledger(source, place, 8, None)
    words, pool = LexicalConfig(language=None), PoolConfig()
    build_lexical("embed", words, source, ledger.parts, ledger.rows, place, pool, tasks=run_here)
    return place
