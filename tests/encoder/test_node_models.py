"""Actors of one machine that need the same weights: one fetches them, the others wait."""

import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from embedloom.encoder import registry


def fetch(cache: str) -> Path:
    """Resolve a name whose fetching takes a while and leaves a note of its begin and end."""
    marks = Path(cache) / "marks"

    def slow(name: str) -> Path:
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
        return registry.resolve_on_node("some/model")


def test_two_processes_fetch_a_model_once(tmp_path: Path):
    with ProcessPoolExecutor(2) as processes:
        found = list(processes.map(fetch, [str(tmp_path)] * 2))
    assert found == [tmp_path / "model"] * 2
    assert len(list((tmp_path / "marks").iterdir())) == 1


def test_a_local_folder_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(registry, "cache_folder", lambda: tmp_path / "cache")
    assert registry.resolve_on_node(str(tmp_path)) == tmp_path
    assert not (tmp_path / "cache").exists()
