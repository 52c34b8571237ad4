"""What several teachers said of an example's documents, from mining to the rows that training reads; worked by hand."""

import math

import pyarrow as pa
import pytest
from pydantic import ValidationError

from embedloom.config.base import read_yaml
from embedloom.config.mining import SelectionConfig
from embedloom.config.run import RunConfig
from embedloom.config.shipped import config_file
from embedloom.config.training import TrainingSource
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.mining.candidates import SCORES_SCHEMA, Mined
from embedloom.mining.examples import ExampleWorker
from embedloom.mining.queries import pair_files, write_queries
from embedloom.training.sources import read_source
from fakes_mining import document_row, make_corpus, pair_row

DOCUMENTS = [document_row(f"d{n}", f"text {n}") for n in range(6)]
PAIRS = [
    pair_row("a", "frage", "d0"),
    pair_row("label", "a fine day", "nowhere", positive="joy", negatives=["anger", "fear"], task_type="classification"),
]  # fmt: skip
# (documents, best first, their scores), of two teachers; d5 is no candidate of the second, and d1 none of the first.
RANKED = [(["d0", "d2", "d3", "d5"], [0.9, 0.8, 0.7, 0.5]), (["d3", "d1", "d2"], [0.6, 0.4, 0.3])]
POSITIVES = [0.95, 0.65]
GIVEN = [[0.2, 0.1], [0.05, 0.15]]  # of the label's negatives


@pytest.fixture
def built(tmp_path):
    """The tables of the examples of both pairs, blended of two teachers, as an examples artefact."""
    corpus = make_corpus(tmp_path / "corpus", DOCUMENTS, PAIRS)
    out = Place(str(tmp_path / "mining"))
    counts = write_queries(pair_files(corpus, []), (corpus.place, "documents/train"), out, 100)
    parts = tuple(sorted(name.rpartition("/")[2] for name in out.names("queries", ".parquet")))
    for teacher, (documents, scores) in enumerate(RANKED):
        for number, part in enumerate(parts):
            rows = out.read_table(f"queries/{part}").to_pylist()
            candidates = [
                {
                    "query_id": row["id"], "document_ids": [] if row["negatives"] else documents,
                    "scores": [] if row["negatives"] else scores, "teacher": f"t{teacher}", "contract_hash": "h",
                }
                for row in rows
            ]  # fmt: skip
            own = [
                {
                    "query_id": row["id"], "teacher": f"t{teacher}", "positive_score": POSITIVES[teacher],
                    "lowest_score": POSITIVES[teacher], "given_scores": GIVEN[teacher] if row["negatives"] else [],
                }
                for row in rows
            ]  # fmt: skip
            name = f"part-{teacher * len(parts) + number:06d}.parquet"
            out.write_table(f"candidates/{name}", table_from_rows("candidates", candidates))
            out.write_table(f"positive_scores/{name}", pa.Table.from_pylist(own, schema=SCORES_SCHEMA))
    texts = [(corpus.place, "documents/train"), *((out, f"given/{group}") for group in counts["given"])]
    worker = ExampleWorker(
        SelectionConfig(method="naive", negatives=4, blend="intra_sample"),
        Mined(out, parts, 2, tuple(texts), corpus.place),
    )
    examples = Place(str(tmp_path / "examples"))
    for part in parts:
        for folder, table in worker(out.read_table(f"queries/{part}")).items():
            examples.write_table(f"{folder}/{part}", table)
    return examples


def read(place, tmp_path, teacher):
    source = TrainingSource(name="own", format="examples", path=place.uri)
    found = {row.id: row for row in read_source(source, None, tmp_path / "scratch", teacher)}
    shown = {
        name: [None if math.isnan(score) else round(score, 4) for score in row.scores]
        for name, row in found.items()
    }
    return shown, found


def test_each_teachers_scores_are_of_the_same_documents(built, tmp_path):
    by_first, found = read(built, tmp_path, "t0")
    # In turn the next best of each: d2 (first), d3 (second), then d3 is there already, d1, and d5.
    assert found["a"].negatives == ["text 2", "text 3", "text 1", "text 5"]
    assert by_first == {"a": [0.95, 0.8, 0.7, None, 0.5], "label": [0.95, 0.2, 0.1]}
    by_second, _ = read(built, tmp_path, "t1")
    assert by_second == {"a": [0.65, 0.3, 0.6, 0.4, None], "label": [0.65, 0.05, 0.15]}


def test_the_mean_is_of_documents_that_all_teachers_know(built, tmp_path):
    mean, _ = read(built, tmp_path, "mean")
    assert mean == {"a": [0.8, 0.55, 0.65, None, None], "label": [0.8, 0.125, 0.125]}


def test_a_teacher_that_did_not_mine_is_refused_with_those_that_did(built, tmp_path):
    with pytest.raises(
        DataError, match=r"source 'own': .*teacher: 't2' did not mine it; allowed: t0, t1, mean"
    ):
        read(built, tmp_path, "t2")


def test_examples_that_know_of_one_teacher_say_what_they_lack(built, tmp_path):
    for name in built.names("teacher_scores", ".parquet"):
        built.delete(name)
    with pytest.raises(
        DataError, match=r"has no teacher_scores/part-000000.parquet, .*: 't0' reads; allowed: null"
    ):
        read(built, tmp_path, "t0")


def run_with(mining, teacher):
    content = read_yaml(config_file("quickstart"))
    content["mining"] |= mining
    content["training"]["distillation"] = {"teacher": teacher}
    return RunConfig.model_validate(content)


TWO = {"teachers": ["minilm-l6", "other/model"]}
BLENDED = {"selection": {"blend": "cross_sample"}}


@pytest.mark.parametrize(
    ("mining", "teacher", "message"),
    [
        ({**TWO, **BLENDED}, None, r"teacher is null, but with mining.selection.blend: cross_sample .* allowed: minilm-l6, other/model, mean"),
        (TWO, "third", r"teacher is 'third'; allowed: minilm-l6, other/model, mean"),
        ({}, "mean", r"'mean', but the examples have the scores of 'minilm-l6' alone; allowed: null"),
        ({**TWO, "rescoring": {"model": "cross"}}, "minilm-l6", r"have the scores of 'cross' alone; allowed: null"),
    ],
)  # fmt: skip
def test_a_run_distils_a_teacher_that_it_has(mining, teacher, message):
    with pytest.raises(ValidationError, match=message):
        run_with(mining, teacher)


@pytest.mark.parametrize(
    ("mining", "teacher"),
    [({}, None), (TWO, None), ({**TWO, **BLENDED}, "mean"), (TWO, "other/model"), ({**TWO, "rescoring": {"model": "cross"}}, None)],
)  # fmt: skip
def test_a_run_distils_any_of_its_teachers(mining, teacher):
    assert run_with(mining, teacher).training.distillation.teacher == teacher
