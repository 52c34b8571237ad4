"""The quickstart of a decoder, shorter: SmolLM2 made bidirectional learns to rank by the same commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORTER = (
    "synthesis=null", "training.mix={public: 1.0}", "training.runs=[{name: alpha, seed: 1}]", "mining.audit={}",
    "training.stages.0.max_steps=160", "training.stages.1.max_steps=80", "evaluation.baselines=[bm25]",
)  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_a_decoder_made_bidirectional_learns_in_minutes(tmp_path):
    settings = [f"run.output_dir={tmp_path}", *SHORTER]
    command = [sys.executable, "-m", "embedloom", "run", str(ROOT / "jobs/configs/quickstart_llama.yaml")]
    flags = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "quickstart_llama"
    scores = json.loads((run / "evaluation/scores.json").read_text())["models"]
    assert scores["base"]["heldout"] < scores["merged"]["heldout"]
    verdict = json.loads((run / "gate/verdict.json").read_text())
    assert verdict["verdict"] == "passed" and verdict["mean"]["low"] > 0
    assert "against the baseline bm25" in "".join(verdict["reasons"])
