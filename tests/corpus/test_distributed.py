"""The corpus in many pieces, ranges and buckets equals the serial rule (``fakes_corpus_serial``), byte for byte."""

import random
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedloom.compute.shards import run_here, run_tasks
from embedloom.config.corpus import CorpusConfig, CorpusSource
from embedloom.corpus import cutting, stage
from embedloom.corpus.clean import SourceRow
from embedloom.corpus.reading import RAW_SCHEMA, Sizes, blocks_of, own_rows
from embedloom.corpus.stage import build_corpus
from embedloom.errors import DataError
from fakes_corpus import corpus_writer, jsonl_source, save_word_tokenizer, sentence, write_jsonl
from fakes_corpus_serial import build_serially

TINY = Sizes(piece_bytes=8_000, block_rows=40, block_bytes=15_000, bucket_rows=1_500)
SOME = Sizes(piece_bytes=20_000, block_rows=90, bucket_rows=9_000)
WORDS = {
    "eng": ["storm", "river", "paper", "engine", "silver", "window", "market", "garden", "letter", "bridge"],
    "rus": ["буря", "река", "бумага", "двигатель", "серебро", "окно", "рынок", "сад", "письмо", "мост"],  # noqa: RUF001
    "hin": ["तूफान", "नदी", "कागज", "इंजन", "चांदी", "खिड़की", "बाजार", "बगीचा", "पत्र", "पुल"],
    "tha": ["พายุ", "แม่น้ำ", "กระดาษ", "เครื่องยนต์", "เงิน", "หน้าต่าง", "ตลาด", "สวน", "จดหมาย", "สะพาน"],
    "zho": list("风暴河流纸引擎银窗市场花园信桥"),
    "ara": ["عاصفة", "نهر", "ورقة", "محرك", "فضة", "نافذة", "سوق", "حديقة", "رسالة", "جسر"],
}


def text_of(rng: random.Random, lang: str, words: int) -> str:
    joined = ("" if lang == "zho" else " ").join(
        rng.choice(WORDS[lang]) + str(rng.randrange(40)) for _ in range(words)
    )
    return joined if rng.random() < 0.8 else joined.replace(" ", "\n", 2)


def varied(rng: random.Random, texts: list[str]) -> str:
    """A new text, or one that repeats another exactly but for case, or nearly."""
    kind = rng.random()
    if texts and kind < 0.15:
        return rng.choice(texts).upper()
    if texts and kind < 0.35:
        return f"{rng.choice(texts)} and {rng.choice('abc')}"
    return text_of(rng, rng.choice(list(WORDS)), rng.choice([2, 20, 40, 70]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_word_tokenizer(tmp_path_factory.mktemp("words"))


def mixed_sources(folder: Path, seed: int) -> tuple[CorpusSource, ...]:
    """Documents with ids, Parquet in small row groups, pairs of which texts repeat, and a BEIR folder that repeats some."""
    rng = random.Random(seed)
    texts: list[str] = []

    def draw(count: int) -> list[str]:
        found = []
        for _ in range(count):
            found.append(varied(rng, texts))
            texts.append(found[-1])
        return found

    for part in range(3):
        rows = [{"text": text, "head": f"Title {n % 5}"} for n, text in enumerate([*draw(30), "", "x\ud800"])]
        write_jsonl(folder / "docs" / f"{part}.jsonl", rows)
    pq.write_table(
        pa.table({"body": draw(40), "key": [f"{seed}-{n:03d}" for n in range(40)]}),
        folder / "a.parquet",
        row_group_size=9,
    )
    answers = draw(25)
    rows = [{"q": f"Question {n % 30}?", "a": rng.choice(answers)} for n in range(60)]
    rows += [{"q": "question 3?", "a": rng.choice(answers)} for _ in range(6)]
    write_jsonl(folder / "pairs.jsonl", rows)
    beir = folder / "beir"
    write_jsonl(
        beir / "corpus.jsonl",
        [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(draw(20))],
    )
    write_jsonl(
        beir / "queries.jsonl", [{"_id": f"q{n}", "text": f"QUESTION  {n % 20}?"} for n in [*range(12), 20]]
    )
    (beir / "qrels").mkdir()
    judged = ["q0\td1\t1\n", "q20\td1\t2\n"] + [
        f"q{n % 13}\td{rng.randrange(22)}\t{rng.choice(['1', '2.0'])}\n" for n in range(30)
    ]
    (beir / "qrels" / "train.tsv").write_text("".join(judged))
    return (
        jsonl_source(folder / "docs", title_column="head", query_from="first_sentence", lang="eng"),
        CorpusSource(format="parquet", path=str(folder / "a.parquet"), text_column="body", id_column="key"),
        jsonl_source(folder / "pairs.jsonl", text_column="a", query_column="q", dataset="faq", lang="hin"),
        CorpusSource(format="beir", path=str(beir)),
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))
    }


def shuffled(stage_name, function, items, *shared, **_):
    """Tasks that end in another order than they are asked for, as on a cluster; results still come in order."""
    order = list(range(len(items)))
    random.Random(0).shuffle(order)
    found = {number: function(items[number], *shared) for number in order}
    return (found[number] for number in range(len(items)))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [Sizes(), TINY, Sizes(piece_bytes=20_000, block_rows=60, bucket_rows=900)],
    ids=["one", "tiny", "some"],
)
def test_any_cut_of_the_work_gives_the_serial_bytes(tmp_path, tokenizer, monkeypatch, seed, sizes):
    monkeypatch.setattr(cutting, "PART_ROWS", 50)
    monkeypatch.setattr(stage, "PART_ROWS", 50)
    monkeypatch.setattr("fakes_corpus_serial.PART_ROWS", 50)
    config = CorpusConfig(
        sources=mixed_sources(tmp_path / "in", seed), split={"dev": 0.2, "test": 0.2}, min_characters=10,
        near_duplicate_threshold=0.7, chunk_tokens=32, chunk_overlap_tokens=4,
    )  # fmt: skip
    serial = build_serially(config, 42, tokenizer, corpus_writer(tmp_path / "serial"))
    monkeypatch.setattr(stage, "_SMALL_BYTES", 0 if sizes == TINY else 2**30)
    found = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "found"), shuffled, sizes)
    assert found.counts == serial.counts
    expected = {
        "duplicate",
        "near_duplicate",
        "duplicate_query",
        "query_in_other_split",
        "too_short",
        "empty",
        "judged_query_missing",
    }
    assert expected <= set(found.counts["rejects"])
    assert files_of(tmp_path / "found") == files_of(tmp_path / "serial")
    assert not found.place.exists(stage.STEPS_FOLDER)


def test_a_killed_build_goes_on_behind_its_last_finished_task(tmp_path, tokenizer, monkeypatch):
    """It dies in its 30th task; the second process does none of the first 29 again and writes what one run writes."""
    config = CorpusConfig(sources=mixed_sources(tmp_path / "in", 3), chunk_tokens=32, min_characters=10)
    monkeypatch.setattr(stage, "_SMALL_BYTES", 0)
    done: Counter[str] = Counter()

    def dying(limit):
        def tasks(stage_name, function, items, run, step, *shared, **_):
            for item in items:
                if done.total() == limit:
                    raise KeyboardInterrupt
                yield function(item, run, step, *shared)
                done[f"{step}-{item[0]}"] += 1

        return tasks

    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "found"), dying(29), TINY)
    found = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "found"), dying(-1), TINY)
    assert set(done.values()) == {1} and done.total() > 60
    whole = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "whole"), run_here, Sizes())
    assert found.counts == whole.counts
    assert files_of(tmp_path / "found") == files_of(tmp_path / "whole")


@pytest.mark.ray
def test_ray_tasks_build_what_one_process_builds(tmp_path, tokenizer, monkeypatch, ray_local):
    config = CorpusConfig(sources=mixed_sources(tmp_path / "in", 4), chunk_tokens=32, min_characters=10)
    whole = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "whole"))
    monkeypatch.setattr(stage, "_SMALL_BYTES", 0)
    found = build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "found"), run_tasks, SOME)
    assert found.counts == whole.counts
    assert files_of(tmp_path / "found") == files_of(tmp_path / "whole")


def test_errors_are_those_of_one_process_whatever_the_cut(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(stage, "_SMALL_BYTES", 0)
    rows = [{"text": sentence(number), "key": f"k{number % 50:03d}"} for number in range(60)]
    source = jsonl_source(write_jsonl(tmp_path / "in.jsonl", rows), id_column="key")
    config = CorpusConfig(sources=(source,), chunk_tokens=None)
    with pytest.raises(DataError, match=r"id 'k000' stands for two texts \(.*:1 and .*:51\)"):
        build_corpus(config, 42, tokenizer, corpus_writer(tmp_path / "out"), run_here, TINY)
    empty = jsonl_source(write_jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match=r"empty.jsonl \(jsonl\) holds no document"):
        build_corpus(
            CorpusConfig(sources=(empty,), chunk_tokens=None),
            42,
            tokenizer,
            corpus_writer(tmp_path / "b"),
            run_here,
            TINY,
        )


def test_rows_pass_through_files_whole():
    """Every field of a source row, so that one added later is not lost between two steps."""
    row = SourceRow(
        "text",
        "source",
        "group",
        "title",
        "eng",
        "id",
        ("a", "b"),
        (1.0, 2.5),
        "instruction",
        "faq",
        "outline",
    )
    assert all(getattr(row, field.name) for field in fields(SourceRow))
    bare = SourceRow("only a text", "source")
    (table,) = blocks_of([(0, row), (1, bare)], Sizes(), RAW_SCHEMA)
    assert list(own_rows(table)) == [row, bare]
