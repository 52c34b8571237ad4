"""A whole run on two Ray nodes that share nothing but an S3 server: killed, resumed, repeated, served."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fakes_nodes import node_environment, prepare

ROOT = Path(__file__).parents[2]
ARTEFACTS = (
    "corpus", "encoder", "mining", "examples", "training/alpha/pretrain", "merged", "evaluation", "gate", "vectors",
)  # fmt: skip


def write_corpus(folder: Path) -> None:
    topics = ["rivers", "graphs", "sorting", "matrices", "lists", "colours"]
    (folder / "qrels").mkdir(parents=True)
    documents = (
        {"_id": f"d{n}", "title": "", "text": f"{topics[n % 6]} chapter {n}: all about {topics[n % 6]}"}
        for n in range(60)
    )
    queries = ({"_id": f"q{n}", "text": f"what is chapter {n} on {topics[n % 6]}?"} for n in range(60))
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(60))
    (folder / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")


@pytest.mark.ray
@pytest.mark.drill  # ten minutes: every stage starts its actors on a node of its own
@pytest.mark.timeout(2400)
def test_two_nodes_that_share_only_a_bucket(tmp_path: Path, tiny_llama: Path, tiny_model: Path):
    write_corpus(tmp_path / "in" / "corpus")
    shutil.copytree(tiny_llama, tmp_path / "in" / "base")
    shutil.copytree(tiny_model, tmp_path / "in" / "teacher")
    site = prepare(tmp_path / "site")
    environment = {**os.environ, **node_environment(tmp_path / "first", None)}
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "RAY_ADDRESS", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    # A short name: a path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="el-s3-", dir="/tmp", ignore_cleanup_errors=True) as short:
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, [site, ROOT / "platform", ROOT / "tests"])),
            "FAKE_HUB": str(tmp_path / "hub"), "RAY_TMPDIR": short, "RAY_AUTH_TOKEN_PATH": f"{short}/token",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "fakes_store_run.py"), str(tmp_path)],
            env=environment, capture_output=True, text=True, check=False, timeout=2300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["killed"] == -9
    assert found["codes"] == [0, 0] and found["served"] == 0, done.stderr[-6000:]
    assert found["before"] > 10 and found["kept"]  # what was finished when the driver died stayed as it was
    keys = found["keys"]
    assert {f"{name}/manifest.json" for name in ARTEFACTS} <= set(keys)
    assert not any(part.startswith("_") and part != "_golden.json" for key in keys for part in key.split("/"))
    assert found["last"] == "s3://site/runs/tiny/report.html" and "report.html" in keys
    assert "s3://site/in/corpus/corpus.jsonl" in found["answer"]
    assert found["here"] == []  # nothing of the run is on the first node's disk
    fetched = tmp_path / "second" / "cache" / "stored-models"
    names = {path.parent.name for path in fetched.glob("*/*/*/config.json")}
    assert names >= {"teacher", "encoder", "pretrain", "merged"}
