"""Vectors made while rows are written: what mining then finds, and what it must not take."""

import numpy as np
import pyarrow as pa
import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.encoder.tokenizer import InstructionTooLong
from embedloom.retrieval.embed import Ahead, AheadVectors, AheadWorker, EmbeddingWorker, TextColumns

QUERIES = TextColumns(texts=("text",), task_type="task_type", instruction="instruction")


class CountingEmbedder:
    """A vector of four numbers drawn by what it is asked; remembers the texts."""

    def __init__(self, contract_hash: str = "c1") -> None:
        self.contract_hash = contract_hash
        self.seen: list[str] = []

    def embed(self, texts, side, task_types, instructions):
        self.seen.extend(texts)
        assert side == "query"
        rows = [
            [len(text), len(task), len(instruction or ""), 1.0]
            for text, task, instruction in zip(texts, task_types, instructions, strict=True)
        ]
        return np.array(rows, np.float32), [len(text) for text in texts]


class Source:
    def __init__(self, embedder: CountingEmbedder, name: str = "teacher") -> None:
        self.embedder, self.name = embedder, name

    def open(self) -> CountingEmbedder:
        return self.embedder


class Cramped(CountingEmbedder):
    """Refuses a batch that holds an instruction of more than ten characters, as encoders do."""

    def embed(self, texts, side, task_types, instructions):
        if max(map(len, instructions)) > 10:
            raise InstructionTooLong("the instruction leaves nothing")
        return super().embed(texts, side, task_types, instructions)


def test_queries_that_mining_rejects_for_their_instruction_are_left_out(tmp_path):
    rows, out = Place(str(tmp_path / "rows")), Place(str(tmp_path / "ahead"))
    columns = {"query": ["red", "blue"], "task_type": ["retrieval"] * 2, "instruction": ["Find", "Find " * 9]}
    rows.write_table("part-000000.parquet", pa.table(columns))
    rows.write_table("part-000001.parquet", pa.table(columns).slice(1))
    worker = AheadWorker(Source(Cramped()), rows, out)
    worker("part-000000.parquet")
    worker("part-000001.parquet")
    known = [("red", "retrieval", "Find"), ("blue", "retrieval", "Find " * 9)]
    assert list(AheadVectors(out).find(known, "c1", "teacher")) == [0]
    assert out.files() == ["part-000000.parquet"]


@pytest.fixture
def ahead(tmp_path) -> Place:
    """Three written rows, two of them alike, in one part, and a part without rows."""
    rows = Place(str(tmp_path / "rows"))
    columns = {
        "query": ["red", "blue", "red"], "task_type": ["retrieval"] * 3, "instruction": ["Find", "Find", "Find"], "id": list("abc"),
    }  # fmt: skip
    rows.write_table("part-000000.parquet", pa.table(columns))
    rows.write_table("part-000001.parquet", pa.table(columns).slice(0, 0))
    out = Place(str(tmp_path / "ahead"))
    worker = AheadWorker(Source(CountingEmbedder()), rows, out)
    worker("part-000000.parquet")
    worker("part-000001.parquet")
    return out


def asked(texts, instruction="Find"):
    count = len(texts)
    return pa.table(
        {"id": texts, "text": texts, "task_type": ["retrieval"] * count, "instruction": [instruction] * count}
    )


def embed(ahead, rows, **source):
    embedder = CountingEmbedder(source.pop("contract_hash", "c1"))
    worker = EmbeddingWorker(Source(embedder, **source), "query", "done", "float32", QUERIES, ahead)
    return worker(rows)["done"], embedder.seen


def test_only_queries_that_are_not_there_are_embedded_and_all_tokens_are_counted(ahead):
    table, seen = embed(ahead, asked(["green", "red", "blue"]))
    assert seen == ["green"]
    without, everything = embed(None, asked(["green", "red", "blue"]))
    assert everything == ["green", "red", "blue"]
    assert table.equals(without) and table.schema.metadata == without.schema.metadata


def test_when_all_are_there_the_model_is_not_asked(ahead):
    table, seen = embed(ahead, asked(["red", "blue", "red"]))
    assert not seen
    assert table.column("vector").to_pylist() == [[3, 9, 4, 1], [4, 9, 4, 1], [3, 9, 4, 1]]


@pytest.mark.parametrize(
    "change", [{"instruction": "Find the colour"}, {"contract_hash": "c2"}, {"name": "another"}]
)
def test_vectors_of_another_instruction_prompt_or_model_are_not_taken(ahead, change):
    rows = asked(["red"], change.pop("instruction", "Find"))
    assert embed(ahead, rows, **change)[1] == ["red"]


def test_a_part_is_embedded_once_and_an_empty_folder_knows_nothing(ahead, tmp_path):
    refusing = CountingEmbedder()
    AheadWorker(Source(refusing), Place(str(tmp_path / "rows")), ahead)("part-000000.parquet")
    assert not refusing.seen
    assert ahead.files() == ["part-000000.parquet"]
    assert AheadVectors(Place(str(tmp_path / "none"))).find([("red", "retrieval", "Find")], "c1", "t") == {}


def test_every_teacher_has_a_pool_and_a_folder_of_its_own(tmp_path):
    sources = (Source(CountingEmbedder(), "one"), Source(CountingEmbedder(), "two"))
    links = Ahead(Place(str(tmp_path)), sources, PoolConfig()).links(Place(str(tmp_path)), "rows", "round-0")
    assert [link.arguments["source"].name for link in links] == ["one", "two"]
    assert [link.arguments["out"].uri for link in links] == [f"{tmp_path}/{n}/round-0" for n in (0, 1)]
