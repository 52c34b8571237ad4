"""Weights in the object store instead of in every actor."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.retrieval.embed import TextColumns, embed_corpus
from embedloom.retrieval.embedder import EncoderSource, SharedEncoderSource, share_weights
from embedloom.retrieval.vector_files import read_vectors


@pytest.mark.parametrize("pool", [PoolConfig(), PoolConfig(max_actors=4, gpus=1)])
def test_single_actors_and_gpus_load_the_folder_themselves(pool: PoolConfig):
    source = EncoderSource("name", Path("nowhere"))
    assert share_weights(source, pool) is source


@pytest.mark.ray
def test_actors_over_shared_weights_give_the_vectors_of_a_loaded_encoder(
    ray_local, tiny_model: Path, tmp_path: Path
):
    source = EncoderSource("tiny", tiny_model, dtype="float32")
    pool = PoolConfig(min_actors=2, max_actors=2)
    shared = share_weights(source, pool)
    assert isinstance(shared, SharedEncoderSource)
    texts = [f"text number {number % 9} of some length" for number in range(24)]
    expected = Encoder.load(tiny_model, threads=1, dtype="float32").embed(texts, "document")
    # One shard a call, so that batches, and with them the order of sums, are those of the one call above.
    here, _ = shared.open().embed(texts, "document", ["retrieval"] * 24, [None] * 24)
    np.testing.assert_array_equal(here, expected)

    place = Place(str(tmp_path))
    ids = [f"t{number:02d}" for number in range(24)]
    place.write_table("texts/part-000000.parquet", pa.table({"id": ids, "text": texts}))
    embed_corpus(
        stage="embed", source=place, source_folder="texts", output=place, done_folder="vectors", model=source,
        side="document", pool=pool, shard_rows=6, columns=TextColumns(texts=("text",)),
    )  # fmt: skip
    found, vectors = read_vectors(place, "vectors")
    assert found == ids
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
