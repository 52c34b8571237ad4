"""``embedloom.embed`` on Ray Datasets: lazy, in order, and the command's vectors to the bit."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import embedloom
from embedloom.config.cluster import load_cluster
from embedloom.config.embedding import EmbeddingConfig
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.pipeline.model_commands import embed_texts
from embedloom.retrieval.vector_files import read_vectors

pytestmark = pytest.mark.ray
CLUSTER = Path(__file__).parents[2] / "cluster" / "cluster.yaml"
ROWS = 96
SHARD = 32
TEXTS = [f"Seite {n}: {'über Daten, die fließen, ' * (n % 7)}ข้อมูล" for n in range(ROWS)]


@pytest.fixture(scope="module")
def command(ray_local, tiny_model, tmp_path_factory):
    """Ids and vectors that ``embedloom embed`` stores of the texts."""
    folder = tmp_path_factory.mktemp("command")
    lines = (json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS))
    (folder / "in.jsonl").write_text("".join(lines))
    config = EmbeddingConfig(corpus=str(folder / "in.jsonl"), model=str(tiny_model), shard_rows=SHARD)
    embed_texts(config, str(folder / "out"), load_cluster(CLUSTER), "local", dry_run=False)
    return read_vectors(Place(str(folder / "out")), "vectors")


@pytest.fixture
def documents(tmp_path):
    """A dataset read from three files."""
    for part in range(3):
        rows = slice(part * SHARD, (part + 1) * SHARD)
        table = pa.table(
            {"id": [f"d{n}" for n in range(ROWS)][rows], "text": TEXTS[rows], "page": range(ROWS)[rows]}
        )
        pq.write_table(table, tmp_path / f"part-{part}.parquet")
    return ray.data.read_parquet([str(tmp_path / f"part-{part}.parquet") for part in range(3)])


def test_vectors_are_the_commands_to_the_bit_and_rows_keep_their_order(command, documents, tiny_model):
    ids, vectors = command
    embedded = embedloom.embed(
        documents, model=str(tiny_model), batch_size=SHARD, concurrency=2, num_cpus=1, count_tokens=True
    )
    rows = embedded.take_all()
    assert [row["id"] for row in rows] == ids
    assert [row["page"] for row in rows] == list(range(ROWS))
    found = np.stack([row["vector"] for row in rows]).astype(np.float32)
    assert found.tobytes() == vectors.tobytes()
    encoder = Encoder.load(tiny_model, dtype="float32")
    assert [row["tokens"] for row in rows] == [len(ids) for ids in encoder.tokenize(TEXTS, "document")]
    assert sum(row["tokens_left_out"] for row in rows) == encoder.cuts.left_out > 0


def test_embedding_is_lazy_and_errors_name_what_is_wrong(ray_local, documents, tiny_model):
    executed = []
    source = documents.map_batches(lambda batch: executed.append(1) or 1 / 0, batch_format="pyarrow")
    embedloom.embed(source, model=str(tiny_model))  # would end here, if anything were run
    numbers = embedloom.embed(
        documents.select_columns(["page"]).rename_columns({"page": "text"}), model=str(tiny_model)
    )
    with pytest.raises(Exception, match=r"column 'text' holds int 0 .*allowed: text or null"):
        numbers.take(1)


def test_the_class_in_map_batches_in_numpy_and_in_arrow(command, documents, tiny_model):
    by_id = dict(zip(*command, strict=True))
    for batch_format in ("numpy", "pyarrow"):
        mapped = documents.map_batches(
            embedloom.Embedder,
            fn_constructor_kwargs={"model": str(tiny_model), "dtype": "float16"},
            batch_size=SHARD,
            batch_format=batch_format,
            concurrency=1,
        )
        for row in mapped.take_all():
            np.testing.assert_array_equal(row["vector"], by_id[row["id"]].astype(np.float16))
