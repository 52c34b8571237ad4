"""What happens on a node that is not the one where the command runs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fakes_mining import make_tiny_cross_encoder
from fakes_nodes import node_environment, prepare

ROOT = Path(__file__).parents[1]


@pytest.mark.ray
@pytest.mark.slow  # ten pools and an endpoint start one after another
@pytest.mark.timeout(1900)
def test_a_node_without_the_first_ones_cache_mines_embeds_scores_and_serves(tmp_path: Path, tiny_model: Path):
    hub = tmp_path / "hub" / "org"
    shutil.copytree(tiny_model, hub / "tiny")
    make_tiny_cross_encoder(hub / "cross")
    site = prepare(tmp_path / "site")
    environment = {**os.environ, **node_environment(tmp_path / "first", None)}
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "RAY_ADDRESS", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    paths = [site, ROOT / "platform", ROOT / "tests"]
    # A short name: a path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="el-two-", dir="/tmp", ignore_cleanup_errors=True) as short:
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "FAKE_HUB": str(tmp_path / "hub"),
            "RAY_TMPDIR": short,
        }
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "fakes_nodes.py"), str(tmp_path / "work")],
            env=environment, capture_output=True, text=True, check=False, timeout=1800,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    driver, without, own = found.pop("devices")
    assert driver[1] == without[1] == "cpu" and driver[2] != "bf16" and without[2] != "bf16"
    assert without[0] == "" and own == ["0", "cuda", "bf16"]
    assert found.pop("shared") == 12
    assert found == {"mined": 8, "rescored": 8, "vectors": 12, "scores": 2, "served": 32}
    fetched = tmp_path / "work" / "second" / "cache" / "huggingface" / "hub"
    assert {path.name for path in fetched.iterdir()} == {"models--org--tiny", "models--org--cross"}
