"""Runs that differ: what each makes of the training section."""

from pathlib import Path

import pytest

from embedloom.config.run import load_run
from embedloom.config.training import Candidate, TrainingConfig
from embedloom.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "jobs" / "configs" / "nemotron_8b.yaml"
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart_llama.yaml"
STAGES = [
    {"name": "first", "negatives": 1, "global_batch": 8, "learning_rate": 1e-3, "max_steps": 10},
    {
        "name": "second",
        "negatives": 4,
        "global_batch": 4,
        "learning_rate": 1e-4,
        "sources": [
            {"name": "a", "format": "mined", "dataset": "a", "cap": 100},
            {"name": "b", "format": "mined", "dataset": "b", "cap": 50},
        ],
    },
]


def section(*runs, **settings):
    return TrainingConfig(runs=[{"name": "plain", "seed": 1}, *runs], stages=STAGES, **settings)


def own(config, number):
    return config.of_run(config.runs[number])


def test_a_run_changes_what_it_names_and_nothing_else():
    changes = {
        "first": {"epochs": 2, "negatives": 3},
        "second": {"learning_rate": 5e-5, "sources": {"a": {"cap": 10}, "b": {"drop": True}}},
    }
    config = section({"name": "other", "seed": 2, "temperature": 0.1, "loss": "gecko", "stages": changes})
    plain, other = own(config, 0), own(config, 1)
    assert plain.stages == config.stages and (plain.temperature, plain.loss) == (0.02, "infonce")
    assert (other.temperature, other.loss) == (0.1, "gecko")
    first, second = other.stages
    assert (first.epochs, first.max_steps, first.negatives, first.global_batch) == (2, None, 3, 8)
    assert (second.learning_rate, second.negatives) == (5e-5, 4)
    assert [(source.name, source.cap) for source in second.sources] == [("a", 10)]
    assert own(config, 1).runs == (Candidate(name="other", seed=2),)


def test_the_older_name_of_the_key_still_works():
    runs = [{"name": "a", "seed": 1}]
    assert TrainingConfig(candidates=runs, stages=STAGES) == TrainingConfig(runs=runs, stages=STAGES)
    with pytest.raises(ConfigError, match="two names of one list; allowed: runs"):
        load_run(QUICKSTART, ["training.candidates=[{name: a, seed: 1}]"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"third": {}}, "run 'other' changes stage 'third'; allowed: first, second"),
        ({"second": {"sources": {"c": {"cap": 1}}}}, "'c' is no source of the stage; allowed: a, b"),
        ({"first": {"sources": {"a": {"cap": 1}}}}, "allowed: none, the stage has the run's mined examples by mix"),
        ({"second": {"sources": {"a": {"weight": 1}}}}, r"sources\.a: a weight in place of a cap"),
        ({"second": {"sources": {"a": {"drop": True}, "b": {"drop": True}}}}, "all are dropped"),
        ({"first": {"negatives": 0}}, "negatives is 0 in run 'other'"),
        ({"first": {"learning_rte": 1}}, "learning_rte"),
    ],
)  # fmt: skip
def test_changes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        section({"name": "other", "seed": 2, "stages": changes})


def test_more_negatives_than_mined_in_one_run_are_refused():
    with pytest.raises(ConfigError, match="use up to 9 negatives"):
        load_run(QUICKSTART, ["training.runs.1.stages={finetune: {negatives: 9}}"])


def test_six_runs_of_the_paper_differ_and_the_first_is_the_paper():
    training = load_run(PAPER).training
    made = [training.of_run(run) for run in training.runs]
    assert len(made) == 6
    rows = [sum(source.cap for source in config.stages[1].sources) for config in made]
    assert rows[0] == 4_309_502  # arXiv 2511.07025 Table 9
    assert (rows[1], rows[2]) == (rows[0] - 522_106, rows[0] - 500_000)
    assert rows[3] == rows[0] - 522_106 - 119_999 - 91_407 - 84_767
    variants = {
        config.model_dump_json(exclude={"runs"}) + str(config.runs[0].learning_rate_scale) for config in made
    }
    assert len(variants) == 6
