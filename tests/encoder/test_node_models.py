"""Models by name on several machines and in several processes: each finds its own, and of those on one machine one fetches."""

import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

from embedloom.encoder import registry
from embedloom.encoder.registry import NodeModel, hub_cache
from embedloom.errors import DataError

COMMIT, NEWER = "a" * 40, "b" * 40


def fetch(cache: str) -> Path:
    """Resolve a name whose fetching takes a while and leaves a note of its begin and end."""
    marks = Path(cache) / "marks"

    def slow(name: str, trust_remote_code: bool, revision: str | None) -> Path:
        target = Path(cache) / "model"
        if not target.exists():
            marks.mkdir(exist_ok=True)
            (marks / f"begin-{time.monotonic_ns()}").touch()
            time.sleep(0.3)
            target.mkdir()
        return target

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "cache_folder", lambda: Path(cache))
        patched.setattr(registry, "resolve_model", slow)
        return NodeModel("some/model").folder()


def test_two_processes_fetch_a_model_once(tmp_path: Path):
    with ProcessPoolExecutor(2) as processes:
        found = list(processes.map(fetch, [str(tmp_path)] * 2))
    assert found == [tmp_path / "model"] * 2
    assert len(list((tmp_path / "marks").iterdir())) == 1


def test_a_local_folder_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(registry, "cache_folder", lambda: tmp_path / "cache")
    assert NodeModel(str(tmp_path)).folder() == tmp_path
    assert not (tmp_path / "cache").exists()


def test_a_folder_named_relative_to_where_the_command_runs_travels_as_a_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    named = NodeModel.of("model")
    monkeypatch.chdir("/")
    assert named == NodeModel(str(tmp_path / "model"))
    assert named.folder() == tmp_path / "model"


def hub_copy(hub: Path, commits: list[str], newest: str) -> None:
    """A model as the hub's client leaves it in a cache, at some commits."""
    folder = hub / "models--org--model"
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        (folder / "snapshots" / commit / "model.safetensors").touch()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(newest)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's one cache setting, and nothing else."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_hub_models_lie_below_the_one_cache_setting(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    hub_copy(own_cache / "huggingface" / "hub", [COMMIT], COMMIT)
    assert hub_cache() == own_cache / "huggingface" / "hub"
    assert NodeModel.of("org/model") == NodeModel("org/model", release=COMMIT)
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert hub_cache() != own_cache / "huggingface" / "hub"


def test_a_node_whose_cache_is_newer_opens_the_commit_that_the_command_saw(own_cache: Path, tmp_path: Path):
    hub_copy(own_cache / "huggingface" / "hub", [COMMIT, NEWER], NEWER)
    assert NodeModel("org/model", release=COMMIT).folder().name == COMMIT
    assert NodeModel("org/model").folder().name == NEWER


def test_a_node_that_cannot_fetch_the_commit_says_so(own_cache: Path):
    hub_copy(own_cache / "huggingface" / "hub", [NEWER], NEWER)
    with pytest.raises(DataError, match="org/model"):
        NodeModel("org/model", release=COMMIT).folder()


def test_a_package_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    named = NodeModel.of("minilm-l6")
    assert named.folder().is_dir()
    monkeypatch.setattr(metadata, "version", lambda _: "0.0.1")
    with pytest.raises(DataError, match=r"is 0\.0\.1 on this node and .* where the command was started"):
        named.folder()
