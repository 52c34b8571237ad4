"""Dev scores of vectors that others made are mteb's scores of the model that made them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedloom.config.evaluation import EvaluationTask
from embedloom.config.training import DevScoring
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError, StageError
from embedloom.evaluation.dev import DevTasks, dev_tasks
from embedloom.evaluation.scoring import EncoderModel, score_subset
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.tasks import build_task
from fakes_tasks import make_local_tasks

RANKED = ("retrieval/topics", "reranking/pick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_local_tasks(tmp_path_factory.mktemp("tasks"))


def specs_of(folder):
    return tuple(
        spec
        for path in RANKED
        for spec in expand_tasks(
            [EvaluationTask(name=path.split("/")[1], kind="local", path=str(folder / path))]
        )
    )


def test_scores_are_those_of_the_model_and_follow_the_vectors(folder, tiny_model):
    encoder = Encoder.load(tiny_model, dtype="float32", device="cpu")
    specs = specs_of(folder)
    bench = DevTasks(specs, None, "ndcg_at_10").open(encoder)
    vectors = encoder.embed_tokens(bench.token_ids)
    found = bench.score(vectors)
    for spec in specs:
        files, _ = score_subset(EncoderModel(encoder, "a/b", "c"), build_task(spec, None))
        entries = [e for split in json.loads(files[f"{spec.name}.json"])["scores"].values() for e in split]
        assert found[spec.name] == pytest.approx(np.mean([e["ndcg_at_10"] for e in entries]), abs=1e-6)
    noise = np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)
    assert bench.score(noise) != found
    assert bench.score(vectors) == found


def test_a_text_without_a_vector_is_an_error_and_not_a_call_of_the_model(folder, tiny_model):
    encoder = Encoder.load(tiny_model, dtype="float32", device="cpu")
    bench = DevTasks(specs_of(folder), None, "ndcg_at_10").open(encoder)
    bench._keys = bench._keys[:-1]
    with pytest.raises(StageError, match="dev scoring: mteb asks for 1 texts"):
        bench.score(encoder.embed_tokens(bench.token_ids[:-1]))


def test_a_task_that_ranks_nothing_is_refused(folder, tmp_path):
    table = pq.read_table(folder / "sts" / "near.parquet")
    dev = pa.array(["dev"] * table.num_rows)
    path = tmp_path / "sts" / "near.parquet"
    path.parent.mkdir()
    pq.write_table(table.drop_columns("split").append_column("split", dev), path)
    task = EvaluationTask(name="near", kind="local", path=str(path), split="dev")
    with pytest.raises(ConfigError, match=r"training.dev.tasks: 'near' ranks no documents"):
        dev_tasks(DevScoring(tasks=(task,)), (), None)


def test_a_member_of_a_judged_benchmark_is_refused():
    dev = DevScoring(tasks=(EvaluationTask(name="SciFact", kind="mteb"),))
    judged = (EvaluationTask(name="MTEB(eng, v1)", kind="benchmark"),)
    with pytest.raises(ConfigError, match=r"training.dev.tasks: 'SciFact' is among evaluation.tasks"):
        dev_tasks(dev, judged, None)
