"""Dev tasks must not be what a run is judged on; options are closed and checked."""

from pathlib import Path

import pytest

from embedloom.config.run import load_run
from embedloom.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "jobs" / "configs" / "quickstart_llama.yaml"


def load(*overrides):
    return load_run(QUICKSTART, list(overrides)).training


def test_the_default_dev_task_is_the_runs_own_dev_split():
    dev = load("training.dev={}").dev
    assert [(task.kind, task.split) for task in dev.tasks] == [("heldout", "dev")]
    assert (dev.metric, dev.keep, dev.needs_corpus) == ("ndcg_at_10", "best", True)
    assert load().dev is None


@pytest.mark.parametrize(
    ("task", "judged", "message"),
    [
        ("{name: t, split: test}", None, r"task 't' is of split test.*allowed: split dev"),
        ("{name: t, kind: local, path: a}", None, r"task 't' is of split test"),
        ("{name: NFCorpus, kind: mteb}", "{name: NFCorpus, kind: mteb}", r"'NFCorpus' is what evaluation.tasks"),
        ("{name: d, split: dev}", "{name: h, split: dev}", r"'d' is what evaluation.tasks scores as 'h'"),
        (
            "{name: d, kind: local, path: a/, split: dev}",
            "{name: e, kind: local, path: a, split: dev}",
            r"'d' is what evaluation.tasks scores as 'e'",
        ),
    ],
)  # fmt: skip
def test_a_task_that_the_run_is_judged_on_is_refused(task, judged, message):
    overrides = [f"training.dev={{tasks: [{task}]}}"]
    if judged:
        overrides.append(f"evaluation.tasks=[{judged}]")
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


def test_weights_of_a_merge_are_not_searched_on_what_the_run_is_judged_on():
    search = "merging.search={kind: weights, tasks: [{name: found, split: test}]}"
    with pytest.raises(
        ConfigError, match=r"merging.search.tasks: 'found' is what evaluation.tasks scores as 'h'"
    ):
        load(search, "evaluation.tasks=[{name: h, split: test}]")
    load(search, "evaluation.tasks=[{name: h, split: dev}]")


def test_the_dev_half_of_a_judged_folder_is_fine():
    own = "training.dev={tasks: [{name: d, kind: local, path: a, split: dev}]}"
    assert load(own, "evaluation.tasks=[{name: d, kind: local, path: a, split: test}]").dev is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.trackers=[wandb, wandb]", "trackers must be different"),
        ("training.trackers=[comet]", "tensorboard.*wandb.*mlflow"),
        ("training.parity=[infinity]", "sentence-transformers.*vllm"),
        ("training.dev={keep: first}", "'best' or 'last'"),
        ("training.lora={rank: 4, target_modules: []}", "target_modules is empty"),
        ("training.lora={rank: 4}", "freeze_token_embeddings is set beside lora"),  # quickstart freezes them
    ],
)
def test_a_wrong_option_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load(override)
