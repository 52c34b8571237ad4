from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedloom.config.synthesis import (
    BitextConfig,
    ClassificationConfig,
    ExistingQuestionsConfig,
    SeedQueriesConfig,
    TranslationConfig,
)
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.core.text import hash64
from embedloom.errors import StageError
from embedloom.synthesis.attempts import (
    ATTEMPTS_FILE,
    RoundWork,
    RowSource,
    Stretch,
    Task,
    TaskChoice,
    picks_other,
    read_attempts,
    weighted,
    write_attempts,
)
from embedloom.synthesis.families.base import Attempt
from embedloom.synthesis.quotas import Cell

FAMILIES = {
    "seed_queries": SeedQueriesConfig(rows=9),
    "bitext": BitextConfig(rows=9, document_languages={"deu": 3, "fra": 1}),
}


@pytest.fixture
def work(tmp_path: Path) -> RoundWork:
    """Ten documents; two generators with three and two attempts at seed queries, and four at bitext."""
    place = Place(str(tmp_path / "out"))
    rows = [{"id": f"d{n}", "text": f"text {n}", "source": "s"} for n in range(10)]
    for start in (0, 5):
        name = f"documents/train/part-{start:06d}.parquet"
        Place(str(tmp_path)).write_table(name, table_from_rows("documents", rows[start : start + 5]))
    files = tuple((Place(str(tmp_path)), f"documents/train/part-{start:06d}.parquet") for start in (0, 5))
    return RoundWork(
        seed=1,
        stretches=(
            Stretch(Cell("seed_queries", "a", "eng"), 0, 3),
            Stretch(Cell("seed_queries", "b", "eng"), 0, 2),
            Stretch(Cell("bitext", "b", "eng"), 0, 4),
        ),
        families=FAMILIES,
        prompt_hashes={"a": {"seed_queries": "p1"}, "b": {"seed_queries": "p2", "bitext": "p3"}},
        generators=("a", "b"),
        place=place,
        folder="steps/rows/round-000",
        documents=RowSource("documents", files, same_language=True),
    )


def attempts(work: RoundWork, folder: str) -> list[Attempt]:
    place = work.place
    tables = [place.read_table(n) for n in place.names(f"{work.folder}/attempts/{folder}", ".parquet")]
    return read_attempts(pa.concat_tables(tables))


def test_no_document_is_read_twice_before_all_are_and_rounds_go_on_where_they_stopped(work: RoundWork):
    written = write_attempts(work)
    assert written["attempts"] == {"a": 3, "b": 6}
    assert written["offsets"]["seed_queries"] == {"eng": 5}
    first = [one for folder in ("0", "1") for one in attempts(work, folder) if one.family == "seed_queries"]
    read = [one.document.id for one in first if one.document]
    assert len(set(read)) == 5

    stretch = Stretch(Cell("seed_queries", "b", "eng"), 2, 9)
    later = replace(work, stretches=(stretch,), folder="steps/rows/round-001", offsets=written["offsets"])
    written = write_attempts(later)
    assert written["attempts"] == {"b": 7}
    second = attempts(later, "1")
    assert sorted(one.ordinal for one in second) == list(range(2, 9))
    again = [one.document.id for one in second if one.document]
    assert set(read) | set(again) == {f"d{n}" for n in range(10)}
    assert Counter([*read, *again]).most_common()[1][1] == 2, (
        "twelve attempts of ten documents: two read twice"
    )
    identities = [one.id for one in [*first, *second]]
    assert len(set(identities)) == len(identities)


def test_the_same_work_is_written_the_same_and_another_seed_reads_others(work: RoundWork, tmp_path: Path):
    write_attempts(work)
    other = replace(work, place=Place(str(tmp_path / "again")))
    write_attempts(other)
    for name in work.place.names(f"{work.folder}/attempts/0", ".parquet"):
        assert work.place.read_bytes(name) == other.place.read_bytes(name)
    reseeded = replace(work, seed=2, place=Place(str(tmp_path / "reseeded")))
    write_attempts(reseeded)
    assert {one.id for one in attempts(work, "0")}.isdisjoint(one.id for one in attempts(reseeded, "0"))
    assert work.place.exists(f"{work.folder}/{ATTEMPTS_FILE}")


def test_languages_of_the_other_side_follow_their_weights(work: RoundWork):
    cell = Cell("bitext", "b", "eng")
    many = replace(work, stretches=(Stretch(cell, 0, 2_000),))
    write_attempts(many)
    found = Counter(one.document_language for one in attempts(many, "1"))
    assert set(found) == {"deu", "fra"}
    assert 1_420 < found["deu"] < 1_580  # 1,500 expected; four standard deviations are 77
    assert all(one.language == "eng" and one.document is None for one in attempts(many, "1"))


def test_a_seed_fixes_what_weighted_draws():
    assert [weighted({"x": 1, "y": 3}, number) for number in (0, 2**61, 2**62, 2**64 - 1)] == [
        "x",
        "x",
        "y",
        "y",
    ]
    assert hash64("a") == hash64("a") != hash64("b")


def test_extracting_families_read_each_document_once_and_say_when_they_are_through(work: RoundWork):
    options = {"existing_questions": ExistingQuestionsConfig(rows=20)}
    cell = Cell("existing_questions", "", "eng")
    first = replace(work, families=options, stretches=(Stretch(cell, 0, 8),))
    written = write_attempts(first)
    assert (written["attempts"], written["exhausted"]) == ({"": 8}, [])
    second = replace(
        first, folder="steps/rows/round-001", stretches=(Stretch(cell, 8, 20),), offsets=written["offsets"]
    )
    written = write_attempts(second)
    assert (written["attempts"], written["exhausted"]) == ({"": 2}, ["existing_questions"])
    read = [one.document.id for w in (first, second) for one in attempts(w, "extracted") if one.document]
    assert sorted(read) == sorted(f"d{n}" for n in range(10))


def test_translations_read_pairs_of_other_languages_with_their_documents(work: RoundWork, tmp_path: Path):
    rows: list[dict[str, Any]] = [
        {"id": f"p{n}", "query": f"query {n}", "document_id": f"d{n}", "task_type": "retrieval", "instruction": "i",
         "lang": lang, "document_lang": lang, "origin": "public"}
        for n, lang in enumerate(["eng", "deu", "eng"])
    ]  # fmt: skip
    Place(str(tmp_path)).write_table("pairs/train/part-000000.parquet", table_from_rows("pairs", rows))
    pairs = RowSource(
        "pairs", ((Place(str(tmp_path)), "pairs/train/part-000000.parquet"),), same_language=False
    )
    translating = replace(
        work,
        families={"translation": TranslationConfig(rows=2)},
        stretches=(Stretch(Cell("translation", "a", "deu"), 0, 2),),
        pairs={"translation": pairs},
    )
    write_attempts(translating)
    found = attempts(translating, "0")
    assert {one.language for one in found} == {"deu"}
    assert {(one.pair["id"], one.pair["positive"]) for one in found if one.pair} == {
        ("p0", "text 0"),
        ("p2", "text 2"),
    }


TASKS = [Task(f"t{n}", "ab"[n % 2], f"task {n}") for n in range(20)]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_stated_share_of_tasks_is_another_generators(share: float):
    choice = TaskChoice(TASKS, Cell("classification", "a", "eng"), share, seed=1)
    picked = [choice.pick(ordinal) for ordinal in range(400)]
    assert sum(task.generator == "b" for task in picked) == 400 * share
    for start in range(0, 400, 40):  # evenly spread, not in one block
        assert sum(task.generator == "b" for task in picked[start : start + 40]) == 40 * share
    assert len({task.id for task in picked}) >= 10
    assert [picks_other(n, 0.5) for n in range(4)] == [False, True, False, True]


def test_with_one_generator_its_own_tasks_serve_and_without_any_the_family_is_named():
    cell = Cell("classification", "a", "eng")
    own = [task for task in TASKS if task.generator == "a"]
    assert TaskChoice(own, cell, 1.0, seed=1).pick(0) in own
    with pytest.raises(StageError, match="no task was brainstormed for family classification"):
        TaskChoice([], cell, 1.0, seed=1)


def test_step_two_draws_its_tasks_from_the_folder_of_step_one(work: RoundWork):
    rows = [
        {"id": t.id, "family": f, "generator": t.generator, "text": f"{f} {t.text}"}
        for t in TASKS
        for f in ("x", "y")
    ]
    work.place.write_table("tasks/part-000000.parquet", pa.Table.from_pylist(rows))
    cell = Cell("x", "a", "eng")
    sampled = replace(
        work,
        families={"x": ClassificationConfig(rows=5, name="x")},
        stretches=(Stretch(cell, 0, 6),),
        tasks="tasks",
        cross_model=1.0,
    )
    write_attempts(sampled)
    by_text = {f"x {task.text}": task for task in TASKS}
    assert {by_text[one.task].generator for one in attempts(sampled, "0") if one.task} == {"b"}
