"""Batches on Ray: OpenAI's client against an endpoint, whose processes are killed half way, and which is started again."""

import json
import os
import signal
import socket
import time

import httpx
import openai
import psutil
import pytest

from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import BatchesConfig, ServingConfig
from embedloom.core.storage import Place
from embedloom.serving.batches.lines import LINES_FOLDER, RESULTS_FOLDER
from embedloom.serving.batches.objects import ENDED
from embedloom.serving.stage import Endpoint, start_endpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ENDPOINT = "/v1/embeddings"
WAIT_SECONDS = 540.0
TEXTS = ["hello world", "bonjour le monde", "日本語のテキスト", "x " * 9]


def started(folder, model, **serving) -> Endpoint:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServingConfig(
        port=port,
        compute_dtype="float32",
        require_gate=False,
        batches=BatchesConfig(folder=str(folder)),
        **serving,
    )
    return start_endpoint(config, model, "f00d", "tiny", ServeScaling(threads=1))


def client_of(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="unused", max_retries=5)


def sent(client, bodies):
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": ENDPOINT, "body": {"model": "tiny", **body}}
        for n, body in enumerate(bodies)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("texts.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h").id


def ended(client, batch):
    deadline = time.monotonic() + WAIT_SECONDS
    while (found := client.batches.retrieve(batch)).status not in ENDED:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def results(client, file) -> list[dict]:
    return [json.loads(one) for one in client.files.content(file).text.splitlines()]


def processes(*names: str) -> list[psutil.Process]:
    """Processes of this test session's own Ray whose title names one of these."""
    found = psutil.Process().children(recursive=True)
    return [
        one for one in found if one.is_running() and any(name in " ".join(one.cmdline()) for name in names)
    ]


@pytest.mark.parametrize("gateways", [1, 2])
def test_a_batch_gives_what_the_endpoint_answers(ray_local, tiny_model, tmp_path, gateways):
    bodies = [
        {"input": TEXTS},
        {"input": TEXTS[0], "input_type": "query", "encoding_format": "base64"},
        {"input": "sts", "task": "sts", "encoding_format": "base64"},
        {"input": ""},
    ]
    with started(tmp_path, tiny_model, gateways=gateways) as endpoint:
        client = client_of(endpoint)
        batch = ended(client, sent(client, bodies))
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 4, "completed": 3, "failed": 1}
        for one, body in zip(results(client, batch.output_file_id), bodies, strict=False):
            expected = httpx.post(
                f"{endpoint.url}{ENDPOINT}", json={"model": "tiny", **body}, trust_env=False
            )
            # float32 on CPUs: a vector depends on its own text alone, to the last bit.
            assert one["response"]["body"] == expected.json()
        (error,) = results(client, batch.error_file_id)
        assert (
            error["response"]["status_code"] == 400
            and "empty string" in error["response"]["body"]["error"]["message"]
        )


def test_killed_half_way_and_started_again(ray_local, tiny_model, tmp_path):
    """kill -9 of what computes and of the runner; then the endpoint ends and another one takes the folder."""
    bodies = [{"input": [f"text {n} of line {line}" for n in range(64)]} for line in range(400)]
    kept: dict[str, float] = {}

    def parts() -> dict[str, float]:
        return {str(path): path.stat().st_mtime for path in tmp_path.rglob(f"{RESULTS_FOLDER}/*.parquet")}

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(parts()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with started(tmp_path, tiny_model) as endpoint:
        client = client_of(endpoint)
        batch = sent(client, bodies)
        for count, names in ((1, ("MapWorker", "JobActor")), (3, (":batches",))):
            wait_for(count)
            found = processes(*names)
            assert found, names
            for process in found:
                os.kill(process.pid, signal.SIGKILL)
            kept |= parts()
        wait_for(5)
        assert client.batches.retrieve(batch).status == "in_progress"
    kept |= parts()
    total = len(list(tmp_path.rglob(f"{LINES_FOLDER}/*.parquet")))
    assert 5 <= len(kept) < total
    with started(tmp_path, tiny_model) as endpoint:
        client = client_of(endpoint)
        wait_for(len(kept) + 1)
        now = parts()
        assert {name: now[name] for name in kept} == kept  # nothing that was done is done again
        found = ended(client, batch)
        assert found.request_counts.to_dict() == {"total": 400, "completed": 400, "failed": 0}
        lines = results(client, found.output_file_id)
        assert [one["custom_id"] for one in lines] == [f"r{n}" for n in range(400)]
        for n in (0, 399):
            reply = httpx.post(
                f"{endpoint.url}{ENDPOINT}", json={"model": "tiny", **bodies[n]}, trust_env=False
            )
            assert lines[n]["response"]["body"] == reply.json()
    assert not Place(str(tmp_path)).names("open")
