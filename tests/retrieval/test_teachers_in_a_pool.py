"""Foreign teachers through the actors that embed a corpus."""

import numpy as np
import pyarrow as pa
import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.encoder.registry import resolve_model
from embedloom.errors import ConfigError
from embedloom.retrieval.embed import TextColumns, embed_corpus
from embedloom.retrieval.teachers import EndpointSource, SentenceTransformerSource
from embedloom.retrieval.vector_files import read_vectors
from fakes_endpoint import FakeEndpoint, serve, vector_of

TEXTS = [f"text number {n % 9}" for n in range(20)]


def embedded(folder, model):
    place = Place(str(folder))
    table = pa.table({"id": [f"t{n:02d}" for n in range(len(TEXTS))], "text": TEXTS})
    place.write_table("texts/part-000000.parquet", table)
    counts = embed_corpus(
        stage="embed", source=place, source_folder="texts", output=place, done_folder="vectors", model=model,
        side="document", pool=PoolConfig(), shard_rows=12, columns=TextColumns(texts=("text",)),
    )  # fmt: skip
    ids, vectors = read_vectors(place, "vectors", model.open().contract_hash)
    assert ids == table.column("id").to_pylist()
    return counts, vectors


@pytest.mark.ray
def test_an_endpoint_is_asked_once_per_text_of_a_shard(ray_local, tmp_path):
    with serve(FakeEndpoint("reversed")) as endpoint:
        model = EndpointSource(name="remote", url=endpoint.url, model="served", batch_size=4)
        counts, vectors = embedded(tmp_path, model)
        expected = np.array([vector_of(text) for text in TEXTS])
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        # shards of 12 and 8 rows hold 9 and 8 different texts of three words
        assert counts == {"rows": 20, "tokens": 3 * 17}
        with pytest.raises(ConfigError, match="'NO_SUCH_KEY'"):
            embedded(
                tmp_path / "other",
                EndpointSource("remote", endpoint.url, "served", api_key_env="NO_SUCH_KEY"),
            )


@pytest.mark.ray
def test_a_sentence_transformers_model_in_an_actor(ray_local, tmp_path):
    model = SentenceTransformerSource(
        "minilm", resolve_model("minilm-l6"), max_document_tokens=32, dtype="float32"
    )
    counts, vectors = embedded(tmp_path, model)
    here, tokens = model.open().embed(TEXTS[:9], "document", ["retrieval"] * 9, [None] * 9)
    assert (vectors[:9] * here).sum(axis=1).min() > 0.9999
    assert counts["tokens"] == sum(tokens) + sum(tokens[(12 + n) % 9] for n in range(8))
