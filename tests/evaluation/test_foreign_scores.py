"""Foreign models score as mteb scores them through sentence-transformers: layers, prompts and all."""

import json

import pytest

from embedloom.config.evaluation import EvaluationTask
from embedloom.encoder.tokenizer import CutTexts
from embedloom.evaluation.jobs import Scorer
from embedloom.evaluation.scorers import make_scorers
from embedloom.evaluation.scoring import EvaluationActor, run_mteb
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.tasks import build_task
from embedloom.retrieval.teachers import SentenceEncoder
from fakes_foreign import make_transformer, save_library_model, static_model, with_dense
from fakes_tasks import make_local_tasks

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = make_local_tasks(tmp_path_factory.mktemp("tasks"))
    return {s.name: s for s in expand_tasks([EvaluationTask(name="mine", kind="local", path=str(root))])}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    bert = make_transformer(root / "bert", limit=300)
    prompts = {"query": "query : ", "document": "list of ", "own": "big "}
    return {
        "dense": save_library_model(root / "dense", bert, later=with_dense),
        "prompts": save_library_model(root / "prompts", bert, prompts=prompts),
        "default prompt": save_library_model(
            root / "default", bert, prompts=prompts, default_prompt_name="own"
        ),
        "static": static_model(root / "static"),
        "short": save_library_model(root / "short", bert, max_seq_length=20),
    }


def score(files, name):
    (entries,) = json.loads(files[f"{name}.json"])["scores"].values()
    return [entry["main_score"] for entry in entries]


TASKS = ("topics", "near", "topic", "pick")
CASES = [(model, task) for model in ("dense", "prompts", "default prompt") for task in TASKS]


@pytest.mark.parametrize(("model", "task"), [*CASES, ("static", "topics"), ("static", "topic")])
def test_a_foreign_model_scores_as_its_library_lets_it(models, tasks, model, task):
    from sentence_transformers import SentenceTransformer

    (scorer,), _ = make_scorers({"foreign": models[model]}, (), None)
    assert isinstance(scorer, Scorer)
    ours = EvaluationActor(None, "float32", 1)._load(scorer)
    theirs = SentenceTransformer(str(models[model]), device="cpu")
    found, expected = (score(run_mteb(one, build_task(tasks[task], None)), task) for one in (ours, theirs))
    assert found == pytest.approx(expected, abs=1e-5)


def test_what_the_library_cuts_is_counted(models):
    """30 words and two special tokens at a limit of 20; static embeddings have none."""
    encoder = SentenceEncoder(models["short"], "float32")
    encoder.embed(["cats " * 30, "dogs"], "document")
    assert encoder.cuts == CutTexts(texts=2, cut=1, read=20 + 3, left_out=32 - 20)
    whole = SentenceEncoder(models["static"], "float32")
    whole.embed(["cats " * 300], "document")
    assert whole.cuts.counts() == {}


def test_every_part_of_a_foreign_model_counts_in_its_revision(models, tmp_path):
    from safetensors.torch import load_file, save_file

    first = make_scorers({"m": models["dense"]}, (), None)[0][0].revision
    weights = models["dense"] / "2_Dense" / "model.safetensors"
    changed = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    before = weights.read_bytes()
    save_file(changed, weights)
    assert make_scorers({"m": models["dense"]}, (), None)[0][0].revision != first
    weights.write_bytes(before)
    assert make_scorers({"m": models["dense"]}, (), None)[0][0].revision == first
