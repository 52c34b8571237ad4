"""The drill of the dashboard: a Prometheus of its own scrapes an endpoint under load, and each panel's query must return data.

    python tests/drills/serve_dashboard.py [--model minilm-l6] [--seconds 40]

Two gateways, two models, a corpus, a batch; needs `prometheus` and `promtool` (Debian's package). Panels of GPUs and of training stay
empty here, and are said to be.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from serve_process import NAME, Load, Running, endpoint, finish, free_port

from embedloom.serving.address import find

ROOT = Path(__file__).resolve().parents[2]
SCRAPE_SECONDS = 2
# Of machines with GPUs, of training runs, and of an object store that is full.
NOT_HERE = ("GPU", "Training", "Spilled")
TEXTS = [f"text {number} of a small corpus" for number in range(64)]


def corpus(model: str, folder: Path) -> Path:
    """Vectors of a few texts, by `embedloom embed`."""
    lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    out = folder / "vectors"
    command = [sys.executable, "-m", "embedloom.cli", "embed", str(folder / "texts.jsonl")]
    subprocess.run(
        [*command, "--model", model, "--out", str(out)], check=True, capture_output=True, timeout=300
    )
    return out


def panels() -> list[tuple[str, str]]:
    """Title and query of every graph."""
    content = json.loads((ROOT / "cluster/grafana_dashboard.json").read_text())
    return [
        (panel["title"], target["expr"]) for panel in content["panels"] for target in panel.get("targets", ())
    ]


def prometheus(running: Running, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A Prometheus that scrapes the endpoint and Ray; and its address."""
    session = Path(find(running.port).session).parent
    port = free_port()
    config = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": [str(ROOT / "cluster/alerts.yaml")],
        "scrape_configs": [
            {"job_name": "embedloom", "static_configs": [{"targets": [f"127.0.0.1:{running.port}"]}]},
            {
                "job_name": "ray",
                "file_sd_configs": [{"files": [str(session / "prom_metrics_service_discovery.json")]}],
            },
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    subprocess.run(
        ["promtool", "check", "config", folder / "prometheus.yml"], check=True, capture_output=True
    )
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (folder / "prometheus.log").open("wb") as log:
        started = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    return started, f"http://127.0.0.1:{port}/api/v1"


def ask(api: str, path: str, **parameters: str) -> Any:
    return httpx.get(f"{api}/{path}", params=parameters, trust_env=False, timeout=30).json()["data"]


def send_batch(url: str) -> str:
    """A batch by plain HTTP; returns its id."""
    lines = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": NAME, "input": text},
        }
        for n, text in enumerate(TEXTS)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    with httpx.Client(trust_env=False, timeout=60) as client:
        file = client.post(
            f"{url}/v1/files", data={"purpose": "batch"}, files={"file": ("b.jsonl", content)}
        ).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
        return str(client.post(f"{url}/v1/batches", json=asked).json()["id"])


def drill(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns what was seen, and what is wrong with it."""
    vectors = corpus(options.model, folder)
    settings = (
        "gateways=2",
        f"corpus={vectors}",
        f"batches.folder={folder}/batches",
        f"models.second.model={options.model}",
        "models.second.require_gate=false",
    )
    bodies = [
        {"model": NAME, "input": TEXTS[:4]},
        {"model": "second", "input": TEXTS[0], "input_type": "query"},
        {"model": NAME, "input": "long " * 2000, "truncate": "end"},
    ]
    with endpoint(options.model, folder, (1, 1), settings) as running:
        started, api = prometheus(running, folder)
        try:
            batch = send_batch(running.url)
            with Load(running.url, lambda number: bodies[number % 3], 8, pause_seconds=0.05) as load:
                over = time.monotonic() + options.seconds
                status = ""
                # Until the batch is done, too: a pool of its own takes its time to start on a busy machine.
                while time.monotonic() < over or (status != "completed" and time.monotonic() < over + 240):
                    reply = httpx.post(
                        f"{running.url}/v1/search", json={"query": "text"}, trust_env=False, timeout=60
                    )
                    reply.raise_for_status()
                    status = httpx.get(
                        f"{running.url}/v1/batches/{batch}", trust_env=False, timeout=60
                    ).json()["status"]
                    time.sleep(0.5)
            window = f"{10 * SCRAPE_SECONDS}s"
            seen = {}
            for title, query in panels():
                found = ask(api, "query", query=query.replace("$__rate_interval", window))["result"]
                values = [float(one["value"][1]) for one in found]
                seen[title] = min(seen.get(title, 99), sum(value == value for value in values))  # no NaN
            rules = ask(api, "rules")["groups"]
            targets = ask(api, "targets")["activeTargets"]
        finally:
            started.terminate()
            started.wait(30)
    problems = [
        f"no data: {title}" for title, count in seen.items() if not count and not title.startswith(NOT_HERE)
    ]
    problems += [f"{one['scrapeUrl']}: {one['lastError']}" for one in targets if one["health"] == "down"]
    problems += [
        f"{rule['name']}: {rule['lastError']}"
        for group in rules
        for rule in group["rules"]
        if rule["health"] == "err"
    ]
    if status != "completed" or set(load.statuses) != {200}:
        problems.append(f"batch {status}; requests {dict(load.statuses)} {load.errors}")
    return {
        "drill": "serve_dashboard",
        "series": seen,
        "targets": len(targets),
        "statuses": dict(load.statuses),
    }, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        parser.error("prometheus is not installed (Debian: apt-get install prometheus)")
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        finish(*drill(options, Path(folder)))


if __name__ == "__main__":
    main()
