"""A run on two Ray nodes that share nothing but an S3 server: run as a program, in an environment of its own.

The first node has the driver and no CPU, so all work is the second's, which has a HOME and a cache of its own and sees nothing of
the first's. The driver is killed once training has a checkpoint, and the command is given again; then the first node serves what
the second has made.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import yaml
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from fakes_nodes import node_environment

BUCKET = "site"
QUESTION = "what is chapter 3 on matrices?"


def main(folder: Path) -> None:
    """Prints what happened as one JSON line."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    upload(client, folder / "in")
    config = folder / "first" / "run.yaml"
    config.write_text(yaml.safe_dump(run_config()))
    cluster = two_nodes(folder)
    try:
        print(json.dumps(results(client, config)), file=sys.__stdout__, flush=True)
    finally:
        cluster.shutdown()
        server.stop()


def upload(client: Any, folder: Path) -> None:
    """Corpus, base and teacher go to the bucket, and then are nowhere else."""
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"in/{path.relative_to(folder).as_posix()}")
            path.unlink()


def run_config() -> dict[str, Any]:
    """A whole run whose every path is an address."""
    return {
        "run": {"name": "tiny", "output_dir": f"s3://{BUCKET}/runs"},
        "corpus": {
            "sources": [{"format": "beir", "path": f"s3://{BUCKET}/in/corpus"}],
            "min_characters": 5, "near_duplicate_threshold": None, "chunk_tokens": None,
            "split": {"dev": 0.1, "test": 0.3},
        },
        "mining": {
            "teachers": [f"s3://{BUCKET}/in/teacher"], "top_k": 20, "max_query_tokens": 128,
            "selection": {"negatives": 2, "margin_ratio": 1.0},
        },
        "encoder": {"base": f"s3://{BUCKET}/in/base", "max_query_tokens": 128, "max_document_tokens": 64},
        "training": {
            "mix": {"public": 1}, "zero_stage": 0, "checkpoint_every_steps": 2,
            "runs": [{"name": "alpha", "seed": 1}],
            "stages": [
                {"name": "pretrain", "negatives": 2, "global_batch": 4, "learning_rate": 0.001, "max_steps": 6}
            ],
        },
        "evaluation": {"baselines": ["bm25"]},
        "serving": {"require_gate": False, "port": 18764},
    }  # fmt: skip


def two_nodes(folder: Path) -> Any:
    """The cluster; the second node cannot see the first's folder."""
    from ray.cluster_utils import Cluster

    from embedloom.cluster.session import ensure_token, set_ray_environment
    from embedloom.config.cluster import AuthConfig

    auth = AuthConfig(token_path=os.environ["RAY_AUTH_TOKEN_PATH"])
    set_ray_environment(auth)
    ensure_token(auth)
    Path(os.environ["RAY_TMPDIR"], "ray").mkdir(exist_ok=True)
    cluster = Cluster(shutdown_at_exit=True)
    own = {
        "temp_dir": f"{os.environ['RAY_TMPDIR']}/ray",
        "object_store_memory": 100 * 2**20,
        "include_dashboard": False,
    }
    cluster.add_node(num_cpus=0, num_gpus=0, **own)
    cluster.add_node(
        num_cpus=8, num_gpus=0, env_vars=node_environment(folder / "second", folder / "first"), **own
    )
    os.environ["RAY_ADDRESS"] = cluster.address
    return cluster


def command(verb: str, config: Path, *words: str, own_ray: bool = False) -> subprocess.Popen[str]:
    """A command as a user gives it, on the first node; in the cluster, or in a Ray of its own."""
    environment = {key: value for key, value in os.environ.items() if not own_ray or key != "RAY_ADDRESS"}
    arguments = [sys.executable, "-m", "embedloom", verb, config.name, "--profile", "single", *words]
    return subprocess.Popen(
        arguments,
        cwd=config.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        start_new_session=True,
    )


def keys(client: Any, prefix: str) -> dict[str, str]:
    """Objects below a prefix, and their tags."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"runs/tiny/{prefix}")
    return {
        one["Key"].removeprefix("runs/tiny/"): one["ETag"]
        for page in pages
        for one in page.get("Contents", [])
    }


def results(client: Any, config: Path) -> dict[str, Any]:
    """Kill, resume, repeat, serve."""
    first = command("run", config)
    while first.poll() is None and not any(
        "/checkpoint_manager_snapshot" in key for key in keys(client, "training/")
    ):
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {
        key: tag
        for name in ("corpus", "encoder", "mining", "examples")
        for key, tag in keys(client, name).items()
    }
    codes = []
    for _ in range(2):
        again = command("run", config)
        output, _ = again.communicate(timeout=1200)
        codes.append(again.returncode)
    served = command("serve", config, "--ask", QUESTION, own_ray=True)
    answer, _ = served.communicate(timeout=900)
    after = keys(client, "")
    return {
        "killed": first.returncode, "codes": codes, "served": served.returncode, "answer": answer,
        "last": output.strip().splitlines()[-1], "kept": all(after.get(key) == tag for key, tag in before.items()),
        "before": len(before), "keys": sorted(after),
        "here": sorted(path.relative_to(config.parent).as_posix() for path in config.parent.rglob("*.parquet")),
    }  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
