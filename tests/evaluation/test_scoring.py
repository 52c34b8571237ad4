"""What one evaluation actor does, without Ray around it."""

import json
import shutil

import pytest

from embedloom.core.prompting import PromptContract
from embedloom.errors import DataError
from embedloom.evaluation.gate import TIMED_QUERIES
from embedloom.evaluation.jobs import ScoreJob, Scorer, TimeJob, Unit
from embedloom.evaluation.scoring import EvaluationActor
from embedloom.evaluation.specs import TaskSpec
from fakes_evaluation import make_corpus

TASK = TaskSpec("heldout")


def score(actor, unit):
    return actor.work(ScoreJob(unit.label, unit.scorer, (), unit))


def test_a_model_that_does_not_load_leaves_the_actor_usable(tmp_path, tiny_model):
    actor = EvaluationActor(make_corpus(tmp_path / "corpus"), "float32", 1)
    good = Unit(Scorer("good", "models", "x/good", "1", tiny_model), TASK)
    first = score(actor, good)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        score(actor, Unit(Scorer("bad", "models", "x/bad", "1", tmp_path / "empty"), TASK))
    again = score(actor, good)
    scores = [json.loads(outcome.files["heldout.json"])["scores"] for outcome in (first, again)]
    assert scores[0] == scores[1]


def test_tokens_of_a_unit_are_its_own(tmp_path, tiny_model):
    actor = EvaluationActor(make_corpus(tmp_path / "corpus"), "float32", 1)
    unit = Unit(Scorer("good", "models", "x/good", "1", tiny_model), TASK)
    figures = [score(actor, unit).figures for _ in range(2)]
    assert figures[0]["tokens"] == figures[1]["tokens"] > 0
    assert figures[0]["queries"] == figures[0]["documents"] == 6
    lexical = score(actor, Unit(Scorer("bm25", "baselines", "mteb/baseline-bm25s", "1"), TASK)).figures
    assert lexical["tokens"] == 0


def test_a_model_whose_instruction_fills_its_limit_is_timed_all_the_same(tmp_path, tiny_model):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    contract = PromptContract.load(folder).model_copy(update={"max_query_tokens": 16})
    (folder / "contract.json").write_bytes(contract.as_file())
    actor = EvaluationActor(None, "float32", 1)
    figures = actor.work(
        TimeJob("time", Scorer("m", "models", "x/m", "1", folder), queries=TIMED_QUERIES[:5])
    ).figures
    assert figures["queries"] == 5 and figures["p95_milliseconds"] >= figures["p50_milliseconds"] > 0
    # Four to warm up and five that are timed, each cut to the limit.
    assert actor._model.encoder.tokens.real == 9 * 16
