"""``embedloom.Embedder`` on batches, without Ray: columns, empty texts, counts, errors."""

import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

import embedloom
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError, DataError
from embedloom.raydata.embedding import embed

TEXTS = ["Ray streams data.", "Die Übung macht den Meister.", "ข้อมูลไหลผ่าน", "Ray streams data.", "a" * 3000]


@pytest.fixture(scope="module")
def embedder(tiny_model):
    return embedloom.Embedder(str(tiny_model), count_tokens=True)


def vectors_of(table, name="vector"):
    return np.asarray(table.column(name).combine_chunks().flatten()).reshape(table.num_rows, -1)


def test_importing_the_package_imports_neither_torch_nor_ray():
    code = "import embedloom, sys; dir(embedloom); print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert {"embed", "Embedder", "QdrantSink", "__version__"} <= set(dir(embedloom))
    with pytest.raises(AttributeError, match=r"embedloom.*'embedd'"):
        _ = embedloom.embedd


def test_vectors_stand_beside_the_rows_and_equal_texts_share_one(embedder, tiny_model):
    given = pa.table({"n": range(5), "text": TEXTS, "kind": ["x"] * 5})
    table = embedder(given)
    assert table.column_names == ["n", "text", "kind", "vector", "tokens", "tokens_left_out"]
    assert table.select(given.column_names).equals(given)
    encoder = Encoder.load(tiny_model, dtype="float32")
    found = vectors_of(table)
    np.testing.assert_allclose(found, encoder.embed(TEXTS, "document"), atol=1e-6)
    assert found[0].tobytes() == found[3].tobytes()
    whole = [len(ids) for ids in encoder.tokenize(TEXTS, "document")]
    assert table.column("tokens").to_pylist() == whole
    left = table.column("tokens_left_out").to_pylist()
    assert left[:4] == [0, 0, 0, 0]
    # One token a byte, and the special tokens stand within the limit.
    special = len(encoder.tokenize(["a"], "document")[0]) - 1
    assert left[4] == pytest.approx(3000 - (whole[4] - special), rel=0.02)


def test_numpy_batches_come_back_as_numpy(embedder):
    batch = {"text": np.array(TEXTS[:3], dtype=object), "n": np.arange(3)}
    found = embedder(batch)
    assert found["vector"].dtype == np.float32
    arrow = embedder(pa.table({"text": TEXTS[:3], "n": range(3)}))
    assert found["vector"].tobytes() == vectors_of(arrow).tobytes()
    assert found["n"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_texts_of_any_arrow_type(embedder, kind):
    plain = embedder(pa.table({"text": TEXTS[:3]}))
    other = embedder(pa.table({"text": pa.array(TEXTS[:3]).cast(kind)}))
    assert vectors_of(other).tobytes() == vectors_of(plain).tobytes()


def test_rows_without_a_text_are_dropped_and_counted_or_kept_with_null(tiny_model, capsys):
    given = pa.table({"text": ["a", None, " \n", "b", ""], "n": range(5)})
    dropping = embedloom.Embedder(str(tiny_model))
    table = dropping(given)
    assert table.column("n").to_pylist() == [0, 3]
    assert "of 5 rows so far 3 without a text (dropped); no text cut" in capsys.readouterr().err
    keeping = embedloom.Embedder(str(tiny_model), keep_empty=True, count_tokens=True, dtype="int8")
    kept = keeping(given)
    assert kept.column("n").to_pylist() == [0, 1, 2, 3, 4]
    assert [value is None for value in kept.column("vector").to_pylist()] == [False, True, True, False, True]
    assert [value is None for value in kept.column("scale").to_pylist()] == [False, True, True, False, True]
    assert [bool(tokens) for tokens in kept.column("tokens").to_pylist()] == [True, False, False, True, False]
    nothing = dropping(pa.table({"text": pa.array([None, ""], pa.string()), "n": [1, 2]}))
    assert nothing.num_rows == 0
    assert nothing.schema.field("vector").type == table.schema.field("vector").type


def test_titles_are_joined_before_documents_and_not_before_queries(tiny_model):
    given = pa.table({"title": ["Ray", None], "text": ["streams data", "alone"]})
    plain = embedloom.Embedder(str(tiny_model))
    joined = plain(pa.table({"text": ["Ray streams data", "alone"]}))
    assert vectors_of(plain(given)).tobytes() == vectors_of(joined).tobytes()
    queries = embedloom.Embedder(str(tiny_model), side="query")
    bare = queries(given.drop_columns(["title"]))
    assert vectors_of(queries(given)).tobytes() == vectors_of(bare).tobytes()
    encoder = Encoder.load(tiny_model, dtype="float32")
    np.testing.assert_allclose(vectors_of(bare), encoder.embed(given["text"].to_pylist(), "query"), atol=1e-6)


def test_an_instruction_reaches_the_queries(tiny_model):
    told = embedloom.Embedder(str(tiny_model), side="query", instruction="Find the page")
    found = vectors_of(told(pa.table({"text": ["where"]})))
    encoder = Encoder.load(tiny_model, dtype="float32")
    np.testing.assert_allclose(
        found, encoder.embed(["where"], "query", instruction="Find the page"), atol=1e-6
    )
    assert not np.allclose(found, encoder.embed(["where"], "query"), atol=1e-3)


def test_a_batch_that_does_not_fit_is_named(embedder, tiny_model):
    with pytest.raises(DataError, match=r"no column 'text'; columns found: \['body'\]"):
        embedder(pa.table({"body": ["a"]}))
    with pytest.raises(
        DataError, match=r"column 'text' holds int 7 \(row 1 of a batch\); allowed: text or null"
    ):
        embedder({"text": np.array(["a", 7], dtype=object)})
    with pytest.raises(DataError, match=r"a batch is list; allowed: 'pyarrow', 'numpy'"):
        embedder(["a"])
    with pytest.raises(
        ConfigError, match="the column 'vector' is to be added, and the dataset has it already"
    ):
        embedder(pa.table({"text": ["a"], "vector": [1]}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float8"}, r"embed: dtype: .*'float32', 'float16', 'int8' or 'binary'.*'float8'"),
        ({"dimensions": 7}, r"embedding\.dimensions: 7; "),
        ({"instruction": "Find"}, r"embedding\.instruction: documents of task_type"),
        ({"task": "nonsense"}, r"embedding\.task: 'nonsense' is unknown"),
    ],
)
def test_options_that_do_not_fit_are_named(tiny_model, options, said):
    with pytest.raises(ConfigError, match=said):
        embedloom.Embedder(str(tiny_model), **options)


class KnownDataset:
    """What ``embed`` asks of a Dataset before it maps it."""

    def __init__(self, *names):
        self.names = list(names)

    def schema(self, fetch_if_missing):
        assert not fetch_if_missing
        return self


def test_what_the_driver_can_know_is_refused_before_anything_is_mapped(tiny_model):
    with pytest.raises(DataError, match=r"embed: text_column: no column 'text'; columns found: \['body'\]"):
        embed(KnownDataset("body"), model=str(tiny_model))
    with pytest.raises(ConfigError, match="the column 'scale' is to be added"):
        embed(KnownDataset("text", "scale"), model=str(tiny_model), dtype="int8")
    with pytest.raises(TypeError, match="unexpected keyword argument 'dimension'"):
        embed(KnownDataset("text"), model=str(tiny_model), dimension=16)
    with pytest.raises(DataError, match=re.escape("embed: model: './nowhere' does not exist")):
        embed(KnownDataset("text"), model="./nowhere")
