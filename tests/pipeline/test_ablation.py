"""Ablations: variants, what they share, what they build, and the table (``ablation.py``, ``launch_ablate.py``)."""

import json
import shutil
from pathlib import Path

import pytest

from embedloom.config.ablation import AblationConfig
from embedloom.config.cluster import load_cluster
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.pipeline import ablation
from embedloom.pipeline.ablation import (
    Shelf,
    ablate,
    demand,
    inputs_of,
    load_ablation,
    plan_runs,
    score_of,
    shared_work,
    summary,
)
from embedloom.report.leaderboard import ablation_page, ablation_table

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "jobs" / "configs"
CLUSTER = ROOT / "cluster" / "cluster.yaml"
SHIPPED = sorted(CONFIGS.glob("ablation_*.yaml"))
# A small graph: the target needs two, of which one needs the root.
NODES = {"root": (), "side": (), "middle": ("root",), "evaluation": ("middle", "side"), "unused": ("root",)}
PRINTS = {name: f"{name}-1" for name in NODES}


def config_of(**settings):
    defaults = {"name": "x", "base": "quickstart.yaml", "grid": {"training.loss": ["infonce", "gecko"]}}
    return AblationConfig(**{**defaults, **settings})


def write(folder, **settings):
    """An ablation file beside the quickstart, with its runs below ``folder``."""
    shutil.copy(CONFIGS / "quickstart.yaml", folder / "quickstart.yaml")
    content = {"name": "small", "base": "quickstart.yaml", "seeds": [1, 2], **settings}
    path = folder / "ablation.yaml"
    path.write_text(json.dumps(content))
    return path


def planned(path, *overrides):
    config, for_runs = load_ablation(path, overrides)
    return config, plan_runs(config, path, load_cluster(CLUSTER), "local", for_runs)


class Built:
    """Stands in for the building of artefacts: each is an empty folder with a manifest."""

    def __init__(self):
        self.names = []
        self.stop_at = None

    def __call__(self, run, nodes, names, done):
        for name in names:
            inputs = {parent: done[parent] for parent in nodes[name].inputs}
            from embedloom.pipeline.graph import writer_for

            writer = writer_for(run, nodes, name, {key: found.fingerprint for key, found in inputs.items()})
            if len(self.names) == self.stop_at:
                raise KeyboardInterrupt
            if name == "evaluation":
                score = {"infonce": 0.5, "gecko": 0.4}[run.config.training.loss]
                score += run.config.training.runs[0].seed / 100
                writer.place.write_json(
                    "scores.json",
                    {
                        "models": {"merged": {"heldout": score}},
                        "metrics": {"models": {"merged": {"heldout": {}}}},
                    },
                )
            done[name] = writer.commit({"rows": 1})
            self.names.append(f"{run.config.run.name}/{name}")


@pytest.fixture
def built(monkeypatch):
    from contextlib import nullcontext

    fake = Built()
    monkeypatch.setattr(ablation, "build_nodes", fake)
    monkeypatch.setattr(ablation, "preflight", lambda run, verbs: None)
    monkeypatch.setattr("embedloom.cluster.session.ray_session", lambda profile, auth: nullcontext())
    return fake


def test_a_grid_is_every_combination_in_order():
    grid = {"training.loss": ["a", "b"], "training.mix": [{"public": 1}, {"public": 2}]}
    variants = config_of(grid=grid).all_variants
    assert [variant.name for variant in variants] == [
        "loss-a_mix-1",
        "loss-a_mix-2",
        "loss-b_mix-1",
        "loss-b_mix-2",
    ]
    assert variants[3].set == {"training.loss": "b", "training.mix": {"public": 2}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": {}}, "either a grid or variants"),
        ({"variants": [{"name": "a"}]}, "either a grid or variants"),
        ({"grid": {"training.loss": ["a", "a"]}}, "different values"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"grid": {"a.b": [1], "c.b": [1]}, "sedes": [1]}, "sedes"),
    ],
)
def test_bad_ablations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_ablations_plan(path):
    config, _ = load_ablation(path, [])
    runs = plan_runs(config, path, load_cluster(CLUSTER), config.profile, [])
    assert len(runs) == len(config.all_variants) * len(config.seeds)
    work = shared_work(runs, ())
    assert {"corpus", "mining"} <= set(work[0])
    for own in work[1:]:  # the others find the expensive stages there
        assert not {"corpus", "synthesis", "mining", "encoder"} & set(own)
    assert len({planned.prints["evaluation"] for planned in runs}) == len(runs)


def test_the_losses_share_all_but_training():
    path = CONFIGS / "ablation_losses.yaml"
    _, runs = planned(path)
    work = shared_work(runs, ())
    assert all(own == ["training/tuned/finetune", "merged", "evaluation"] for own in work[1:])
    assert [run.run.config.training.runs[0].seed for run in runs[:3]] == [1, 2, 3]


def test_demand_stops_at_what_is_finished():
    assert demand(NODES, PRINTS, ()) == ["root", "side", "middle", "evaluation"]
    assert demand(NODES, PRINTS, {("middle", "middle-1")}) == [
        "side",
        "evaluation",
    ]  # root was for middle alone
    assert demand(NODES, PRINTS, {("middle", "another"), ("side", "side-1")}) == [
        "root",
        "middle",
        "evaluation",
    ]
    assert demand(NODES, PRINTS, {("evaluation", "evaluation-1")}) == []


def test_an_unknown_key_names_the_nearest(tmp_path):
    path = write(tmp_path, grid={"training.los": ["gecko"]})
    with pytest.raises(
        ConfigError, match=r"variant 'los-gecko': training\.los: unknown key.*'loss'"
    ) as error:
        planned(path)
    assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"'median'.*merged, base, alpha, beta"):
        planned(write(tmp_path, grid={"training.loss": ["gecko"]}, model="median"))
    with pytest.raises(ConfigError, match=r"variant 'negatives-1': .*'7' is not an index of a list of 2"):
        planned(write(tmp_path, grid={"training.stages.7.negatives": [1]}))
    with pytest.raises(ConfigError, match="gird: unknown key; the nearest valid key is 'grid'"):
        load_ablation(write(tmp_path, gird={"training.loss": ["gecko"]}), [])


def test_overrides_reach_the_ablation_and_its_runs(tmp_path):
    path = write(tmp_path, grid={"training.loss": ["infonce", "gecko"]})
    config, runs = planned(
        path, "seeds=[7]", "training.temperature=0.5", f"run.output_dir={tmp_path}/elsewhere"
    )
    assert config.seeds == (7,) and [run.seed for run in runs] == [7, 7]
    assert {run.run.config.training.temperature for run in runs} == {0.5}
    assert [one.seed for one in runs[0].run.config.training.runs] == [7, 1007]
    assert runs[0].run.config.folder == f"{tmp_path}/elsewhere/small/loss-infonce-seed7"
    stages = [{"name": "only", "negatives": 2, "global_batch": 4, "learning_rate": 0.001, "max_steps": 9}]
    path = write(tmp_path, grid={"training.loss": ["infonce"]}, set={"training.stages": stages})
    _, runs = planned(path, "training.stages.0.max_steps=5")
    assert runs[0].run.config.training.stages[0].max_steps == 5


def test_an_ablation_builds_once_goes_on_and_ends_in_a_table(tmp_path, built):
    path = write(tmp_path, grid={"training.loss": ["infonce", "gecko"]})
    arguments = (path, None, CLUSTER, [f"run.output_dir={tmp_path}/runs"])
    planned_text = ablate(*arguments, dry_run=True)
    assert "2 variants x 2 seeds" in planned_text and not (tmp_path / "runs").exists()
    built.stop_at = 9
    with pytest.raises(KeyboardInterrupt):
        ablate(*arguments, dry_run=False)
    built.stop_at = None
    text = ablate(*arguments, dry_run=False)
    assert len(built.names) == len(set(built.names))  # what stood before the stop was not built again
    assert sum(name.endswith("/corpus") for name in built.names) == 1
    assert sum(name.endswith("/evaluation") for name in built.names) == 4
    result = json.loads((tmp_path / "runs" / "small" / "ablation.json").read_text())
    assert [variant["mean"] for variant in result["variants"]] == pytest.approx([0.515, 0.415])
    assert result["variants"][1]["difference"]["mean"] == pytest.approx(-0.1)
    assert text.splitlines()[-1] == f"{tmp_path}/runs/small/ablation.json"
    before = list(built.names)
    ablate(*arguments, dry_run=False)
    assert built.names == before


def test_a_finished_run_of_the_base_config_is_used(tmp_path, built):
    path = write(tmp_path, grid={"training.loss": ["infonce", "gecko"]})
    overrides = [f"run.output_dir={tmp_path}/runs"]
    _, runs = planned(path, *overrides)
    one = runs[0]
    made = ArtefactWriter(
        Place(f"{tmp_path}/runs/quickstart/corpus"), "corpus", _settings_print(one, "corpus"), {}, "local"
    ).commit({"rows": 1})
    assert made.fingerprint == one.prints["corpus"]
    half = ArtefactWriter(
        Place(f"{tmp_path}/runs/quickstart/encoder"), "model", _settings_print(one, "encoder"), {}, "local"
    )
    assert half.fingerprint == one.prints["encoder"]  # begun, never finished
    ablate(path, None, CLUSTER, overrides, dry_run=False)
    assert not [name for name in built.names if name.endswith("/corpus")]
    assert len([name for name in built.names if name.endswith("/encoder")]) == 1


def _settings_print(planned_run, name):
    from embedloom.core.artefacts import fingerprint

    return fingerprint(*planned_run.nodes[name].settings)


def test_what_is_about_to_be_built_anew_is_no_longer_found(tmp_path):
    place = Place(str(tmp_path / "run"))
    made = ArtefactWriter(place.child("root"), "root", "c", {}, "local").commit({})
    shelf = Shelf([place, place], NODES)
    assert shelf.keys == {("root", made.fingerprint)}
    shelf.clear(place.child("root"))
    assert shelf.keys == set()


def test_scores_name_what_is_there(tmp_path):
    table = {
        "models": {"merged": {"a": 0.2, "b": 0.4}},
        "metrics": {"models": {"merged": {"a": {"mrr": 0.5, "name": "x"}, "b": {"mrr": 0.7}}}},
    }
    Place(str(tmp_path)).write_json("scores.json", table)
    artefact = Artefact(Place(str(tmp_path)), {})
    assert score_of(artefact, config_of()) == pytest.approx(0.3)
    assert score_of(artefact, config_of(task="b", metric="mrr")) == 0.7
    with pytest.raises(DataError, match="task is 'c'; allowed: a, b"):
        score_of(artefact, config_of(task="c"))
    with pytest.raises(DataError, match=r"metric 'name' is not among those of a"):
        score_of(artefact, config_of(metric="name"))


def test_intervals_by_hand_and_differences_seed_by_seed():
    config = config_of(seeds=[1, 2, 3])
    scores = {"loss-infonce": {1: 0.50, 2: 0.52, 3: 0.54}, "loss-gecko": {1: 0.49, 3: 0.55}}
    first, second = summary(config, scores)["variants"]
    # mean 0.52, standard error 0.02 / sqrt 3, t(0.975, 2) = 4.3027
    assert first["interval"] == pytest.approx([0.52 - 0.049682, 0.52 + 0.049682], abs=1e-5)
    assert first["difference"] is None
    # differences -0.01 and +0.01 of the two seeds both have: mean 0, error 0.01, t(0.975, 1) = 12.7062
    assert second["difference"]["mean"] == pytest.approx(0, abs=1e-12)
    assert second["difference"]["interval"] == pytest.approx([-0.127062, 0.127062], abs=1e-5)
    one = summary(config, {"loss-infonce": {1: 0.5}})["variants"]
    assert one[0]["interval"] is None and one[1]["mean"] is None


def test_the_table_and_the_page_show_every_variant():
    config = config_of(description="<losses>")
    result = summary(config, {"loss-infonce": {1: 0.5, 2: 0.6}})
    lines = ablation_table(result).splitlines()
    assert lines[2].startswith("| variant") and lines[4].startswith("| loss-infonce | 2 of 3 | 0.5500 |")
    assert lines[5].split("|")[2].strip() == "0 of 3"
    page = ablation_page(result)
    assert "&lt;losses&gt;" in page and "training.loss = gecko" in page


def test_inputs_come_before_what_is_made_of_them():
    _, runs = planned(CONFIGS / "ablation_mix.yaml")
    seen = set()
    for name, inputs in inputs_of(runs[0]).items():
        assert set(inputs) <= seen
        seen.add(name)
