"""What one evaluation actor does, without Ray around it."""

import json

import pytest

from embedloom.errors import DataError
from embedloom.evaluation.jobs import ScoreJob, Scorer, Unit
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
