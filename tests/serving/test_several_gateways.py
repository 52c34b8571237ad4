"""Two gateways on Ray Serve: one address, one scrape, one quota; and one of them killed."""

import concurrent.futures
import hashlib
import os
import signal
import socket
import time

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ServingConfig
from embedloom.serving.stage import Endpoint, check_port_free, start_endpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KEY = "sk-of-these-tests"
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def endpoint(ray_local, tiny_model):
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_KEYS", f"tests: {{sha256: {digest}, requests_per_minute: 100000}}")
        config = ServingConfig(
            port=port, compute_dtype="float32", require_gate=False, gateways=2, keys_variable="TEST_KEYS"
        )
        with start_endpoint(config, tiny_model, "f00d", "tiny", ServeScaling(threads=1)) as endpoint:
            yield endpoint


def ask(endpoint: Endpoint, number: int, tries: int = 1) -> int:
    """A request on a connection of its own; 502 and 503 are asked again."""
    for _ in range(tries):
        try:
            reply = httpx.post(
                f"{endpoint.url}/v1/embeddings",
                json={"model": "tiny", "input": f"text {number}"},
                headers={"authorization": f"Bearer {KEY}"},
                trust_env=False,
                timeout=30,
            )
        except httpx.TransportError:  # a gateway died with the connection
            continue
        if reply.status_code not in (502, 503):
            return reply.status_code
        time.sleep(0.2)
    return 0


def answered(endpoint: Endpoint) -> dict[str, float]:
    """Embedding requests answered, by gateway, as one scrape tells."""
    page = httpx.get(f"{endpoint.url}/metrics", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
    assert page.status_code == 200, page.text
    return {
        sample.labels["gateway"]: sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.name == "embedloom_requests_total" and sample.labels["path"] == "/v1/embeddings"
    }


def gateways() -> list[psutil.Process]:
    """Processes of gateways that this test session's own Ray runs."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if ":gateway" in " ".join(process.cmdline())]


def test_both_gateways_answer_and_one_scrape_shows_both(endpoint):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: ask(endpoint, number), range(80))) == [200] * 80
    counts = answered(endpoint)
    assert len(counts) == 2 and sum(counts.values()) == 80
    assert all(count >= 5 for count in counts.values())


def test_a_killed_gateway_is_replaced_and_requests_are_answered_meanwhile(endpoint):
    before = {process.pid for process in gateways()}
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda number: ask(endpoint, number, tries=20), range(40))) == [200] * 40
    deadline = time.monotonic() + WAIT_SECONDS
    while len({process.pid for process in gateways()} | before) < 3 or len(answered(endpoint)) < 2:
        assert time.monotonic() < deadline, "no new gateway answers"
        ask(endpoint, 0, tries=20)
        time.sleep(0.2)


def test_a_stop_ends_both_and_frees_the_port(endpoint):
    endpoint.stop()
    check_port_free("127.0.0.1", int(endpoint.url.split(":")[2]))
