"""What ``scale.py`` measures of each stage beside the corpus: made-up input, and the stage with made-up engines.

A stage is ``make(folder, rows)``, not counted, and ``run(folder, rows, worker)``, counted. The worker stands in for Ray's tasks
and actors: it does what they do in one process of its own, and hands the driver what they would hand it.
"""

import dataclasses
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

PART_ROWS = 10_000
WORDS = [f"word{number:05d}" for number in range(20_000)]
CANDIDATES, NEGATIVES = 20, 4
DUPLICATES, REFUSED = 0.02, 0.05


def place_of(folder: Path) -> Any:
    """A place."""
    from embedloom.core.storage import Place

    return Place(str(folder))


def writer_of(folder: Path, kind: str) -> Any:
    """A writer of an artefact."""
    from embedloom.core.artefacts import ArtefactWriter

    return ArtefactWriter(place_of(folder), kind, "scale", {}, "local")


def texts_of(count: int, words: int, seed: int) -> list[str]:
    """Made-up texts."""
    draw = np.random.default_rng(seed).integers(0, len(WORDS), (count, words))
    return [" ".join(WORDS[word] for word in row) for row in draw.tolist()]


def write_parts(
    place: Any, folder: str, kind: str, rows: int, row: Callable[[int, str], dict[str, Any]], words: int
) -> None:
    """Parts of a table of our own."""
    from embedloom.core.schemas import table_from_rows

    for number, start in enumerate(range(0, rows, PART_ROWS)):
        count = min(PART_ROWS, rows - start)
        found = [row(start + n, text) for n, text in enumerate(texts_of(count, words, number))]
        place.write_table(f"{folder}/part-{number:06d}.parquet", table_from_rows(kind, found))


def document_row(number: int, text: str) -> dict[str, Any]:
    """A document."""
    return {"id": f"{number * 7919:024x}", "text": text, "title": None, "lang": "eng", "source": "made up"}


def make_corpus(folder: Path, rows: int, words: int = 30) -> Any:
    """Documents, and a pair for each: 5 % ask what four others ask, 5 % bring a text that the corpus lacks."""
    draw = random.Random(rows)

    def pair(number: int, text: str) -> dict[str, Any]:
        own = number % 20 != 1
        return {
            "id": f"q{number}", "query": " ".join(text.split()[:8]) if number % 20 else f"what is asked again {number // 100}",
            "document_id": f"{draw.randrange(rows) * 7919:024x}" if own else f"x{number}",
            "positive": None if own else text, "task_type": "retrieval", "instruction": "Find the text.", "lang": "eng",
            "document_lang": "eng", "origin": "public",
        }  # fmt: skip

    out = writer_of(folder, "corpus")
    write_parts(out.place, "documents/train", "documents", rows, document_row, words)
    write_parts(out.place, "pairs/train", "pairs", rows, pair, words)
    return out.commit({"rows": rows})


# Mining: gathering the pairs, then examples of made-up candidates.


def make_gather(folder: Path, rows: int) -> None:
    """Documents and pairs."""
    make_corpus(folder / "corpus", rows)


def run_gather(folder: Path, rows: int, worker: Any) -> None:
    """The pairs in one table of queries."""
    from embedloom.core.artefacts import Artefact
    from embedloom.mining import stage
    from embedloom.mining.queries import pair_files

    stage._MANY_PAIRS = 0  # the same way for all sizes
    worker.replace_ray()
    corpus = Artefact.open(place_of(folder / "corpus"))
    stage._gathered(pair_files(corpus, []), corpus, [], 2048, place_of(folder / "out"))


def make_examples(folder: Path, rows: int) -> None:
    """Queries, and candidates that are drawn."""
    from embedloom.core.schemas import table_from_rows
    from embedloom.mining.candidates import SCORES_SCHEMA, part_names
    from embedloom.mining.queries import pair_files, write_queries

    corpus = make_corpus(folder / "corpus", rows)
    out = writer_of(folder / "mined", "mining")
    queries = write_queries(pair_files(corpus, []), (corpus.place, "documents/train"), out.place, 2048)
    random_numbers = np.random.default_rng(rows)
    for name in part_names(queries):
        asked = out.place.read_table(f"queries/{name}").to_pylist()
        drawn = random_numbers.integers(0, rows, (len(asked), CANDIDATES))
        scores = np.sort(random_numbers.random((len(asked), CANDIDATES)), axis=1)[:, ::-1].astype(np.float32)
        found = [
            {"query_id": row["id"], "document_ids": [f"{number * 7919:024x}" for number in ids], "scores": own,
             "teacher": "made up", "contract_hash": "c"}
            for row, ids, own in zip(asked, drawn.tolist(), scores.tolist(), strict=True)
        ]  # fmt: skip
        out.place.write_table(f"candidates/{name}", table_from_rows("candidates", found))
        own = [
            {"query_id": row["id"], "teacher": "made up", "positive_score": 0.9, "lowest_score": 0.9, "given_scores": []}
            for row in asked
        ]  # fmt: skip
        out.place.write_table(f"positive_scores/{name}", pa.Table.from_pylist(own, schema=SCORES_SCHEMA))
    details = {"teachers": ["made up"], "parts": queries["parts"], "given": queries["given"]}
    out.commit({"rows": queries["rows"]}, details)


def run_examples(folder: Path, rows: int, worker: Any) -> None:
    """Negatives by the rules, counts and audit."""
    from embedloom.config.cluster import PoolConfig
    from embedloom.config.mining import MiningConfig
    from embedloom.core.artefacts import Artefact
    from embedloom.mining import stage

    worker.replace_ray()
    config = MiningConfig.model_validate(
        {"teachers": ["minilm-l6"], "top_k": CANDIDATES, "selection": {"negatives": NEGATIVES}}
    )
    mined, corpus = (Artefact.open(place_of(folder / name)) for name in ("mined", "corpus"))
    stage.build_examples(config, mined, corpus, None, PoolConfig(), writer_of(folder / "out", "examples"))


# Synthesis: what a round's attempts read, and who is refused.


def make_attempts(folder: Path, rows: int) -> None:
    """Documents."""
    make_corpus(folder / "corpus", rows)


def run_attempts(folder: Path, rows: int, worker: Any) -> None:
    """As many attempts as documents, each at another."""
    from embedloom.config.synthesis import SeedQueriesConfig
    from embedloom.synthesis.attempts import RoundWork, RowSource, Stretch, write_attempts
    from embedloom.synthesis.quotas import Cell

    corpus = place_of(folder / "corpus")
    files = tuple((corpus, name) for name in corpus.names("documents/train", ".parquet"))
    work = RoundWork(
        1, (Stretch(Cell("seed_queries", "a", "eng"), 0, rows),), {"seed_queries": SeedQueriesConfig(rows=rows)},
        {"a": {"seed_queries": "p"}}, ("a",), place_of(folder / "out"), "round", RowSource("documents", files, True),
    )  # fmt: skip
    list(worker("attempts", write_attempts, [work]))


ROUND_PART_ROWS = 512
PASSES = ("duplicates", "judge")


def make_refusals(folder: Path, rows: int) -> None:
    """A round's rows in parts, refusals of duplicates in buckets and of the judge part by part."""
    from embedloom.core.schemas import SCHEMAS, table_from_rows
    from embedloom.synthesis.duplicates import bucket_count
    from embedloom.synthesis.quotas import Cell, Tally
    from embedloom.synthesis.refusals import refusal_table

    place, draw = place_of(folder / "work"), random.Random(rows)
    buckets: list[list[dict[str, object]]] = [[] for _ in range(bucket_count(rows))]
    cell = Cell("seed_queries", "a", "eng")
    for number, start in enumerate(range(0, rows, ROUND_PART_ROWS)):
        count, part = min(ROUND_PART_ROWS, rows - start), f"part-{number:06d}.parquet"
        texts = texts_of(count, 12, number)
        found = [
            {"id": f"r{start + n}", "query": text, "document_id": f"d{start + n}", "task_type": "retrieval", "instruction": "i",
             "lang": "eng", "document_lang": "eng", "origin": "synthetic", "generator": "a"}
            for n, text in enumerate(texts)
        ]  # fmt: skip
        table = table_from_rows("pairs", found)
        table = table.append_column("family", pa.array(["seed_queries"] * count))
        table = table.append_column("ordinal", pa.array(range(start, start + count), pa.int64()))
        table = table.append_column("number", pa.array([0] * count, pa.int64()))
        tally = Tally()
        tally.of(cell).rows = count
        place.write_table(f"round/rows/{part}", tally.stamp(table))
        place.write_table(f"round/rejects/{part}", SCHEMAS["rejects"].arrow().empty_table())
        judged = []
        for row in found:
            refusal: dict[str, object] = {
                "part": part,
                "id": row["id"],
                "reason": "judge",
                "detail": "graded 1, below 3",
            }
            if draw.random() < REFUSED:
                judged.append(refusal)
            if draw.random() < REFUSED:
                draw.choice(buckets).append({**refusal, "reason": "duplicate", "detail": "of another"})
        place.write_table(f"round/judge/{part}", refusal_table(judged))
    for number, own in enumerate(buckets):
        place.write_table(f"round/duplicates/bucket-{number:04d}.parquet", refusal_table(own))


def run_refusals(folder: Path, rows: int, worker: Any) -> None:
    """Refusals sorted, rows counted, cut to their quota and written."""
    from embedloom.synthesis import stage
    from embedloom.synthesis.quotas import Cell, Tally
    from embedloom.synthesis.refusals import Round, count_parts, parts_together, sort_refusals

    worker.replace_ray()
    place = place_of(folder / "work")
    one = Round("round", PASSES, parts_together(ROUND_PART_ROWS))
    for name in PASSES:
        sort_refusals("scale", place, one, name)
    tally = Tally()
    for part in worker("scale", count_parts, one.groups(place), one, place):
        tally.merge(part)
    cell = Cell("seed_queries", "a", "eng")
    last = stage.last_places("scale", place, [one], {cell: rows // 2}, {cell: tally.of(cell).rows})
    stage.write_final("scale", place, stage.numbered_parts(place, [one]), last)


# Training preparation, with MiniLM's tokenizer.


def make_prepare(folder: Path, rows: int) -> None:
    """Examples of a query, a positive and four negatives, 30 words each."""
    from embedloom.config.encoder import EncoderConfig
    from embedloom.encoder.export import prepare_base
    from embedloom.encoder.registry import resolve_model

    def example(number: int, text: str) -> dict[str, Any]:
        words = text.split()
        return {
            "id": f"e{number}", "query": " ".join(words[:10]), "query_instruction": "Find the text.", "positive": " ".join(words[:30]),
            "positive_score": 0.9, "negatives": [" ".join(words[n : n + 30]) for n in (10, 20, 30, 40)],
            "negative_scores": [0.1] * 4, "task_type": "retrieval", "dataset": "public",
        }  # fmt: skip

    out = writer_of(folder / "mined", "examples")
    write_parts(out.place, "examples", "examples", rows, example, 70)
    out.commit({"rows": rows})
    (folder / "base").mkdir()
    prepare_base(
        EncoderConfig(base="minilm-l6", max_query_tokens=64, max_document_tokens=64),
        resolve_model("minilm-l6"),
        folder / "base",
    )


def run_prepare(folder: Path, rows: int, worker: Any) -> None:
    """Token ids of all rows."""
    from embedloom.config.training import TrainingConfig, TrainingSource
    from embedloom.core.artefacts import Artefact
    from embedloom.training import data

    data._FEW_RANGES = 0
    stage = {"name": "s", "negatives": 4, "global_batch": 8, "learning_rate": 1e-3}
    config = TrainingConfig.model_validate({"runs": [{"name": "a", "seed": 0}], "stages": [stage]})
    source = TrainingSource(name="public", format="mined", dataset="public")
    mined = Artefact.open(place_of(folder / "mined"))
    data.prepare_sources(
        "scale", config, 4, [source], mined, folder / "base", place_of(folder / "out"), worker
    )


# Embedding: the ledger, shards through a made-up model, shared vectors.


@dataclasses.dataclass(frozen=True)
class MadeUpSource:
    """A model that gives vectors of 64 dimensions at once."""

    name: str = "made up"

    def open(self) -> "MadeUpModel":
        """The model."""
        return MadeUpModel()


class MadeUpModel:
    """Its vectors are drawn."""

    contract_hash = "c"

    def embed(
        self, texts: Sequence[str], side: str, task_types: Sequence[str], instructions: Sequence[str | None]
    ) -> Any:
        """A vector and eight tokens a text."""
        return np.random.default_rng(len(texts)).random((len(texts), 64), dtype=np.float32), [8] * len(texts)


def make_embed(folder: Path, rows: int) -> None:
    """Texts of which 2 % stand twice, in files of one row group each."""
    import pyarrow.parquet as pq

    draw = np.random.default_rng(rows)
    (folder / "in").mkdir(parents=True)
    first = texts_of(1000, 12, 0)
    for number, start in enumerate(range(0, rows, 5 * PART_ROWS)):
        count = min(5 * PART_ROWS, rows - start)
        texts = texts_of(count, 12, number + 1)
        for place in np.flatnonzero(draw.random(count) < DUPLICATES):
            texts[place] = first[int(draw.integers(1000))]
        table = pa.table({"id": [f"d{start + n}" for n in range(count)], "text": texts})
        pq.write_table(table, folder / "in" / f"{number:05d}.parquet", row_group_size=count)


def run_embed(folder: Path, rows: int, worker: Any) -> None:
    """Vectors of all texts."""
    from embedloom.config.cluster import PoolConfig
    from embedloom.config.embedding import EmbeddingConfig
    from embedloom.retrieval import corpora
    from embedloom.retrieval.inputs import open_input
    from embedloom.retrieval.ledger import open_ledger

    worker.replace_ray()
    config, out = EmbeddingConfig(corpus=str(folder / "in"), shard_rows=2048), place_of(folder / "out")
    source = corpora._regrouped(open_input(str(folder / "in"), config, out), out)
    ledger = open_ledger(source, out, config.shard_rows, None)
    corpora.embed_rows(
        stage="scale", source=source, ledger=ledger, out=out, model=MadeUpSource(), normalize=False, config=config,
        pool=PoolConfig(), previous=None,
    )  # fmt: skip


STAGES: dict[str, tuple[Callable[[Path, int], None], Callable[[Path, int, Any], None]]] = {
    "gather": (make_gather, run_gather),
    "examples": (make_examples, run_examples),
    "attempts": (make_attempts, run_attempts),
    "refusals": (make_refusals, run_refusals),
    "prepare": (make_prepare, run_prepare),
    "embed": (make_embed, run_embed),
}


def stream_by(worker: Any) -> Callable[..., Any]:
    """In place of ``compute.shards.stream``: the worker's process reads, computes and writes item after item."""

    def stream(
        *,
        items: Sequence[Any],
        read: Any,
        write: Any,
        worker_arguments: dict[str, Any],
        handling: Any = None,
        **more: Any,
    ) -> Any:
        functions = (read, write, getattr(handling, "prepare", None), getattr(handling, "finish", None))
        done = worker("scale", _one_item, list(enumerate(items)), functions, more["worker"], worker_arguments)
        yield from done

    return stream


_ACTORS: list[Any] = []  # of the worker's process


def _one_item(item: tuple[int, Any], functions: Any, kind: Any, arguments: Any) -> int:
    read, write, prepare, finish = functions
    if not _ACTORS:
        _ACTORS.append(kind(**arguments))
    position, content = item
    table = read(content)
    tables = _ACTORS[0](table if prepare is None else prepare(table))
    for folder, table in (tables if finish is None else finish(tables)).items():
        write(content, folder, table)
    return position


def replace_ray(worker: Any) -> None:
    """Put the worker in place wherever a stage imported Ray's loops."""
    for name, module in list(sys.modules.items()):
        if name.startswith("embedloom."):
            for attribute, value in {"run_tasks": worker, "stream": stream_by(worker)}.items():
                if hasattr(module, attribute):
                    setattr(module, attribute, value)
