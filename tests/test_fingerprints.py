"""The fingerprints of everything that the shipped configs make stay what they were: whoever updates keeps what is built.

``config/fingerprints.json`` holds them as recorded before the package was laid out anew. ``python tests/test_fingerprints.py``
records them again, which is right only for a change that is meant to make older artefacts stale.

Left out of them is what a machine adds: every installed package counts as version 1.0, and each file that a config
names outside the project is a stand-in of a few bytes.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from embedloom.config.cluster import load_cluster
from embedloom.pipeline.ablation import load_ablation, plan_runs
from embedloom.pipeline.commands import load
from embedloom.pipeline.graph import fingerprints, graph

ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "config" / "fingerprints.json"
CLUSTER = ROOT / "cluster" / "cluster.yaml"
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


def outside_paths(content: Any) -> Iterator[str]:
    """Every path of a config that leads out of the project."""
    if isinstance(content, str) and content.startswith("../"):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from outside_paths(value)


@contextlib.contextmanager
def nowhere_in_particular(config: Path, folder: Path) -> Iterator[None]:
    """A working folder with stand-ins for what the config reads, its own cache, and packages of version 1.0."""
    work = folder / "project"
    work.mkdir()
    for name in outside_paths(yaml.safe_load(config.read_text())):
        path = work / name
        path = path if path.suffix else path / "table.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"stands in for {name}\n")
    cache = mock.patch.dict("os.environ", {"EMBEDLOOM_CACHE": str(folder / "cache")})
    with contextlib.chdir(work), cache, mock.patch.object(metadata, "version", lambda name: "1.0"):
        yield


def shipped_fingerprints(config: Path, folder: Path) -> dict[str, str]:
    """By artefact; for an ablation by run, the one that all others of the run lead to."""
    with nowhere_in_particular(config, folder):
        if not config.stem.startswith("ablation_"):
            return fingerprints(graph(load(config, "single", CLUSTER, [])))
        grid, overrides = load_ablation(config, [])
        planned = plan_runs(grid, config, load_cluster(CLUSTER), grid.profile, overrides)
        return {run.label: run.prints["evaluation"] for run in planned}


def test_every_shipped_config_is_recorded():
    assert list(json.loads(RECORDED.read_text())) == [config.name for config in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_fingerprints_are_what_they_were(config, tmp_path):
    assert shipped_fingerprints(config, tmp_path) == json.loads(RECORDED.read_text())[config.name]


def record() -> None:
    found = {}
    for config in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            found[config.name] = shipped_fingerprints(config, Path(folder))
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(record())
