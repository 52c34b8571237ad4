"""Texts tokenized where they are read, and computed where the device is: the same vectors, and no device that waits."""

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedloom.config.cluster import PoolConfig
from embedloom.core.storage import Place
from embedloom.encoder.feeding import Queue
from embedloom.encoder.model import MemoryLimit, run_batches
from embedloom.encoder.tokenizer import CutTexts, InstructionTooLong
from embedloom.errors import DataError
from embedloom.retrieval.embed import AheadWorker, EmbeddingWorker, RowTokens, TextColumns, embed_corpus
from embedloom.retrieval.embedder import EncoderSource, SplitSource
from embedloom.retrieval.teachers import EndpointSource, SentenceTransformerSource
from embedloom.retrieval.vector_files import read_vectors

COLUMNS = TextColumns(texts=("title", "text"), task_type="task_type", instruction="instruction")


def texts(rows: int = 40) -> pa.Table:
    """Equal texts with equal and with other instructions, empty ones, and one that is cut."""
    return pa.table(
        {
            "id": [f"t{n}" for n in range(rows)],
            "title": [None if n % 3 else f"title {n % 7}" for n in range(rows)],
            "text": [
                "a very long text " * 40 if n == 5 else "" if n == 6 else f"text {n % 11}"
                for n in range(rows)
            ],
            "task_type": ["sts" if n % 2 else "retrieval" for n in range(rows)],
            "instruction": ["Find" if n % 5 == 0 else None for n in range(rows)],
            "tokens": list(range(rows)),  # a column of the user's own
        }
    )


def both_ways(source, rows, side="document", ahead=None):
    arguments = (source, side, "done", "float32", COLUMNS, ahead)
    whole = EmbeddingWorker(*arguments)(rows)["done"]
    tokens = RowTokens(pickle.dumps(source), side, COLUMNS)(rows)
    return whole, EmbeddingWorker(*arguments, tokenized=True)(tokens)["done"]


@pytest.mark.parametrize("side", ["query", "document"])
def test_vectors_counts_and_cuts_are_those_of_an_actor_that_tokenizes(tiny_model: Path, side):
    whole, apart = both_ways(EncoderSource("tiny", tiny_model, dtype="float32"), texts(), side)
    assert apart.equals(whole) and apart.schema.metadata == whole.schema.metadata
    assert whole.num_rows == 40 and b"texts_cut" in b"".join(whole.schema.metadata)


def test_vectors_made_ahead_are_taken_and_their_texts_counted(tiny_model: Path, tmp_path: Path):
    source = EncoderSource("tiny", tiny_model, dtype="float32")
    rows, out = Place(str(tmp_path / "rows")), Place(str(tmp_path / "ahead"))
    queries = texts(30).select(["text", "task_type", "instruction"]).rename_columns({"text": "query"})
    rows.write_table("part-000000.parquet", queries.slice(0, 9))
    AheadWorker(source, rows, out)("part-000000.parquet")
    asked = TextColumns(texts=("text",), task_type="task_type", instruction="instruction")
    arguments = (source, "query", "done", "float32", asked, out)
    whole = EmbeddingWorker(*arguments)(texts(30))["done"]
    apart_worker = EmbeddingWorker(*arguments, tokenized=True)
    computed = []
    inner = apart_worker.embedder.embed_tokens
    apart_worker.embedder.embed_tokens = lambda ids: computed.append(len(ids)) or inner(ids)
    apart = apart_worker(RowTokens(pickle.dumps(source), "query", asked)(texts(30)))["done"]
    assert apart.schema.metadata == whole.schema.metadata
    assert apart.column("id").equals(whole.column("id"))
    np.testing.assert_array_equal(
        np.array(apart.column("vector").to_pylist()), np.array(whole.column("vector").to_pylist())
    )
    different = len(set(zip(*(texts(30).column(c).to_pylist() for c in asked_names(asked)), strict=True)))
    assert computed == [different - 9]


def asked_names(columns):
    return (*columns.texts, columns.task_type, columns.instruction)


def test_an_instruction_that_fills_the_limit_is_told_with_the_models_name(tiny_model: Path):
    rows = texts(3).set_column(4, "instruction", [["word " * 60] * 3])
    rows = rows.set_column(2, "text", [["a long text " * 30] * 3])
    with pytest.raises(InstructionTooLong, match="model 'tiny': the instruction takes"):
        RowTokens(pickle.dumps(EncoderSource("tiny", tiny_model)), "query", COLUMNS)(rows)


def test_only_our_own_encoder_can_be_split():
    assert isinstance(EncoderSource("a", Path("nowhere")), SplitSource)
    assert not isinstance(SentenceTransformerSource("a", Path("nowhere")), SplitSource)
    assert not isinstance(EndpointSource("a", "http://nowhere", "m"), SplitSource)


@pytest.mark.ray
def test_tasks_tokenize_and_actors_work_on_two_shards_at_once(ray_local, tiny_model: Path, tmp_path: Path):
    """The way of pools with GPUs, on CPUs: files are bit for bit those of the other way."""
    source, place = EncoderSource("tiny", tiny_model, dtype="float32"), Place(str(tmp_path))
    place.write_table("texts/part-000000.parquet", texts(200))
    counts = {
        done: embed_corpus(
            stage="embed", source=place, source_folder="texts", output=place, done_folder=done, model=source,
            side="document", pool=PoolConfig(), shard_rows=16, columns=COLUMNS, tokenize_apart=apart,
        )
        for done, apart in (("whole", False), ("apart", True))
    }  # fmt: skip
    assert counts["whole"] == counts["apart"] and counts["whole"]["rows"] == 200
    names = place.names("whole")
    assert len(names) == 13 == len(place.names("apart"))
    for name in names:
        assert place.read_bytes(name) == place.read_bytes(name.replace("whole", "apart"))


@dataclass
class Pids:
    """Tokens that say which process made them, and vectors that say both processes."""

    name: str = "pids"
    contract_hash: str = "c"

    def open(self):
        return self

    def open_tokenizer(self):
        return self

    def __post_init__(self):
        self.cuts = CutTexts()

    def tokenize(self, texts, side, task_types, instructions):
        return [[os.getpid()] for _ in texts]

    def embed_tokens(self, token_ids):
        return np.array([[os.getpid(), ids[0]] for ids in token_ids], np.float32)


@pytest.mark.ray
@pytest.mark.parametrize("cpus", [1.0, 0.5])
def test_no_actor_tokenizes_even_where_it_reserves_what_the_reading_task_does(
    ray_local, tmp_path: Path, cpus
):
    """Ray Data runs two steps that reserve the same in one process, if they are let."""
    place = Place(str(tmp_path))
    place.write_table("texts/part-000000.parquet", texts(64))
    embed_corpus(
        stage="embed", source=place, source_folder="texts", output=place, done_folder="out", model=Pids(),
        side="document", pool=PoolConfig(cpus=cpus), shard_rows=16, columns=COLUMNS, tokenize_apart=True,
    )  # fmt: skip
    _, vectors = read_vectors(place, "out")
    assert len(vectors) == 64 and (vectors[:, 0] != vectors[:, 1]).all()


@pytest.mark.ray
def test_what_tokenizing_refuses_ends_the_command_with_its_own_words(
    ray_local, tiny_model: Path, tmp_path: Path
):
    place = Place(str(tmp_path))
    rows = texts(3).set_column(4, "instruction", [["word " * 60] * 3])
    place.write_table("texts/part-000000.parquet", rows.set_column(2, "text", [["a long text " * 30] * 3]))
    with pytest.raises(DataError, match="model 'tiny': the instruction takes"):
        embed_corpus(
            stage="embed", source=place, source_folder="texts", output=place, done_folder="out", side="query",
            model=EncoderSource("tiny", tiny_model), pool=PoolConfig(), shard_rows=16, columns=COLUMNS, tokenize_apart=True,
        )  # fmt: skip


class Feed:
    """A device whose every batch but the very last ends only when another one is queued: one that must wait never ends."""

    def __init__(self, batches: int) -> None:
        self._all = batches
        self._changed = threading.Condition()
        self.started = 0

    def start(self, number_of_texts: int):
        with self._changed:
            self.started += 1
            own = self.started
            self._changed.notify_all()

        def result():
            with self._changed:
                if not self._changed.wait_for(lambda: self.started > own or own == self._all, timeout=60):
                    raise AssertionError(f"the device has nothing queued behind batch {own}")
            return np.zeros((number_of_texts, 2), np.float32)

        return result


@dataclass
class FedEmbedder:
    feed: Feed
    contract_hash: str = "c"

    def embed_tokens(self, token_ids):
        vectors = np.empty((len(token_ids), 2), np.float32)

        def take(batch, found):
            vectors[batch] = found

        queue = Queue(lambda batch: self.feed.start(len(batch)), take, 1)
        run_batches([len(ids) for ids in token_ids], 40, MemoryLimit(), queue)
        queue.finish()
        return vectors


@dataclass
class FedSource:
    embedder: FedEmbedder
    name: str = "fed"

    def open(self):
        return self.embedder


@dataclass
class TenTokens:
    """A tokenizer of ten tokens a text."""

    name: str = "ten"

    def open(self):
        raise AssertionError("no model is opened where texts are tokenized")

    def open_tokenizer(self):
        return self

    def __post_init__(self):
        self.cuts = CutTexts()

    def tokenize(self, texts, side, task_types, instructions):
        return [[1] * 10 for _ in texts]


def test_the_device_always_has_a_batch_behind_the_one_it_computes():
    """Within shards and between them: 6 shards of 12 texts, four texts a batch, two shards at once as an actor has them."""
    rows = pa.table({"id": [str(n) for n in range(12)], "text": [f"text {n}" for n in range(12)]})
    columns = TextColumns(texts=("text",))
    given = RowTokens(pickle.dumps(TenTokens()), "document", columns)(rows)
    feed = Feed(batches=6 * 3)
    worker = EmbeddingWorker(
        FedSource(FedEmbedder(feed)), "document", "done", "float32", columns, tokenized=True
    )
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(worker, [given] * 6))
    assert feed.started == 18 and all(one["done"].num_rows == 12 for one in done)
