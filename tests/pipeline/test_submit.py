"""A submitted run: what its job is told, and the RayJob that ``--render-job`` writes."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.cluster.manifests import RAY_JOB_CONFIG
from embedloom.cluster.render import check_document
from embedloom.config.base import validate
from embedloom.config.cluster import ClusterConfig, load_cluster
from embedloom.config.run import Run, RunConfig, load_run
from embedloom.errors import ConfigError
from embedloom.pipeline import submit
from embedloom.pipeline.submit import SubmitOptions, render_job, submit_run

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs/configs/quickstart.yaml"
CLUSTER = ROOT / "cluster/cluster.yaml"


def run_on(profile: str, *overrides: str) -> Run:
    return Run(load_run(QUICKSTART, list(overrides)), load_cluster(CLUSTER), profile)


@pytest.fixture
def submitted(monkeypatch):
    orders = []
    monkeypatch.setattr(submit, "submit", lambda order, cluster: orders.append(order) or 3)
    return orders


def test_a_job_writes_into_the_users_folder_and_keeps_the_overrides(submitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = SubmitOptions(QUICKSTART, CLUSTER, ("run.seed=1",), stage="mine")
    assert submit_run(run_on("local", "run.seed=1"), options, dry_run=False) == 3
    (order,) = submitted
    assert order.arguments == (
        "mine", str(QUICKSTART), "--profile", "local", "--cluster", str(CLUSTER), "--set", "run.seed=1",
        "--set", f"run.output_dir={tmp_path / 'runs'}",
    )  # fmt: skip
    assert order.start_head and order.address is None and order.working_dir == tmp_path


def test_a_shared_root_is_the_jobs_own_business(submitted):
    options = SubmitOptions(QUICKSTART, CLUSTER, address="http://head:8265", on_interrupt="detach")
    submit_run(run_on("a100x64"), options, dry_run=False)
    (order,) = submitted
    assert not any("output_dir" in word for word in order.arguments)
    assert (order.start_head, order.address, order.on_interrupt) == (False, "http://head:8265", "detach")


def test_commands_are_joined_only_by_their_like(submitted):
    def key(*overrides: str, **options: str) -> str:
        submit_run(
            run_on("local", *overrides), SubmitOptions(QUICKSTART, CLUSTER, overrides, **options), False
        )
        return submitted[-1].key

    assert key() == key()
    assert len({key(), key("run.seed=1"), key(stage="mine"), key("run.name=other")}) == 4


def test_a_shipped_config_goes_by_its_name(submitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for profile, options in (("local", {}), ("a100x64", {"address": "http://head:8265"})):
        submit_run(run_on(profile), SubmitOptions(Path("quickstart"), None, **options), dry_run=False)
        assert submitted[-1].arguments[:4] == ("run", "quickstart", "--profile", profile)
        assert "--cluster" not in submitted[-1].arguments


def test_another_machine_gets_files_below_the_working_folder_only(submitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside.yaml").write_bytes(QUICKSTART.read_bytes())
    inside = SubmitOptions(tmp_path / "inside.yaml", None, address="http://head:8265")
    submit_run(run_on("a100x64"), inside, dry_run=False)
    assert submitted[-1].arguments[1] == "inside.yaml"  # the copy has another place there
    outside = SubmitOptions(QUICKSTART, None, address="http://head:8265")
    with pytest.raises(ConfigError, match=r"quickstart\.yaml: not below the working folder .*--render-job"):
        submit_run(run_on("a100x64"), outside, dry_run=False)
    assert len(submitted) == 1


def test_unknown_stages_are_named(submitted):
    with pytest.raises(ConfigError, match=r"--stage: 'minne' is not a stage of this run; allowed: .*mine"):
        submit_run(run_on("local"), SubmitOptions(QUICKSTART, CLUSTER, stage="minne"), False)
    assert submitted == []


def test_a_rendered_job_holds_everything_it_reads(tmp_path):
    options = SubmitOptions(QUICKSTART, CLUSTER, ("run.seed=7", "run.name=Quick_Start.2"), stage="evaluate")
    render_job(run_on("a100x64", *options.overrides), options, tmp_path / "jobs/job.yaml")
    configs, job = yaml.safe_load_all((tmp_path / "jobs/job.yaml").read_text())
    assert job["metadata"]["name"] == configs["metadata"]["name"] == "embedloom-quick-start-2-evaluate"
    assert configs["metadata"]["namespace"] == "embedloom"
    assert job["spec"]["entrypoint"].split() == [
        "python", "-m", "embedloom.cli", "evaluate", f"{RAY_JOB_CONFIG}/run.yaml", "--profile", "a100x64",
        "--cluster", f"{RAY_JOB_CONFIG}/cluster.yaml",
    ]  # fmt: skip
    inside = validate(RunConfig, yaml.safe_load(configs["data"]["run.yaml"]), "run.yaml")
    assert inside == load_run(QUICKSTART, list(options.overrides))
    assert validate(ClusterConfig, yaml.safe_load(configs["data"]["cluster.yaml"]), "c") == load_cluster(
        CLUSTER
    )
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "config", "configMap": {"name": configs["metadata"]["name"]}} in head["volumes"]
    assert "valid for the autoscaler" in check_document("rayjob.yaml", job)


def test_long_run_names_stay_apart_in_kubernetes(tmp_path):
    names = set()
    for end in ("a", "b"):
        override = f"run.name={'x' * 60}{end}"
        render_job(
            run_on("a100x64", override), SubmitOptions(QUICKSTART, CLUSTER, (override,)), tmp_path / "j.yaml"
        )
        names.add(next(yaml.safe_load_all((tmp_path / "j.yaml").read_text()))["metadata"]["name"])
    assert len(names) == 2
    assert all(len(name) <= 40 for name in names)


def test_what_kuberay_cannot_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--render-job: profile 'local' has no pools"):
        render_job(run_on("local"), SubmitOptions(QUICKSTART, CLUSTER), tmp_path / "job.yaml")
    run = run_on("a100x64")
    content = run.cluster.model_dump()
    content["profiles"]["a100x64"]["storage"] = {}
    rootless = Run(run.config, validate(ClusterConfig, content, "c"), "a100x64")
    with pytest.raises(
        ConfigError, match=r"'runs/quickstart' would be lost .*set profiles\.a100x64\.storage\.root"
    ):
        render_job(rootless, SubmitOptions(QUICKSTART, CLUSTER), tmp_path / "job.yaml")
    assert not (tmp_path / "job.yaml").exists()


def test_the_command_writes_the_file_and_prints_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    target = tmp_path / "job.yaml"
    words = ["submit", "jobs/configs/quickstart.yaml", "--profile", "a100x64", "--render-job", str(target)]
    assert CliRunner().invoke(app, [*words, "--dry-run"]).exit_code == 0
    assert not target.exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == str(target)
    assert target.exists()
