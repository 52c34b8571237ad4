"""Two models on Ray Serve behind one address, of 64 clients at once; and a deploy of one beside the other."""

import concurrent.futures
import itertools
import socket
import threading
from collections import Counter

import httpx
import numpy as np
import pytest
from ray import serve

from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ServedName, ServingConfig
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import open_model, resolve_model
from embedloom.serving.applications import version_names
from embedloom.serving.rollout.deploy import DeployRequest, deploy
from embedloom.serving.rollout.trial import TrialRules
from embedloom.serving.stage import start_endpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CLIENTS = 64


@pytest.fixture(scope="module")
def endpoint(ray_local, tiny_model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    other = ServedName(model="minilm-l6", aliases={"other-query": {"side": "query"}})
    config = ServingConfig(
        port=port, compute_dtype="float32", require_gate=False, models={"other": other}, request_log="none"
    )
    with start_endpoint(config, tiny_model, "f00d", "tiny", ServeScaling(threads=1)) as endpoint:
        yield endpoint


def embed(endpoint, model, text) -> np.ndarray:
    reply = httpx.post(
        f"{endpoint.url}/v1/embeddings", json={"model": model, "input": text}, trust_env=False, timeout=120
    )
    assert reply.status_code == 200, reply.text
    return np.array(reply.json()["data"][0]["embedding"], dtype=np.float32)


def test_each_of_64_clients_gets_the_vectors_of_the_model_it_names(endpoint, tiny_model):
    encoders = {
        "tiny": Encoder.load(tiny_model, dtype="float32"),
        "other": Encoder.load(resolve_model("minilm-l6"), dtype="float32"),
    }
    asked = [(("tiny", "other")[n % 2], f"text {n}") for n in range(2 * CLIENTS)]
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda one: embed(endpoint, *one), asked))
    for (name, text), vector in zip(asked, found, strict=True):
        expected = encoders[name].embed([text], "document")[0]
        assert np.allclose(vector, expected, atol=1e-5), name
    cards = httpx.get(f"{endpoint.url}/v1/models", trust_env=False).json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "other", "other-query"]
    assert cards[1]["fingerprint"] == open_model(resolve_model("minilm-l6")).id != "f00d"


def test_a_deploy_of_the_served_model_leaves_the_other_alone(endpoint, tiny_model, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_model, tmp_path / "next")
    statuses, over = Counter(), threading.Event()

    def load(name):
        with httpx.Client(trust_env=False, timeout=120) as client:
            for number in itertools.count():  # rankings are compared of texts that differ
                if over.is_set():
                    break
                body = {"model": name, "input": [f"text {number}-{k}" for k in range(4)]}
                statuses[name, client.post(f"{endpoint.url}/v1/embeddings", json=body).status_code] += 1

    before = set(version_names())
    threads = [threading.Thread(target=load, args=(name,)) for name in ("tiny", "other", "tiny", "other")]
    for thread in threads:
        thread.start()
    try:
        rules = TrialRules(
            watch_seconds=3, min_requests=3, min_compared=1, max_latency_ratio=50, latency_slack_seconds=30
        )
        outcome = deploy(DeployRequest(open_model(copy), rules, share=0.5, require_gate=False))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert outcome.promoted, outcome.reason
    assert set(statuses) == {("tiny", 200), ("other", 200)}, statuses
    cards = httpx.get(f"{endpoint.url}/v1/models", trust_env=False).json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "other", "other-query"]
    assert cards[0]["fingerprint"] == open_model(copy).id
    assert len(before & set(version_names())) == 1  # the other model's, untouched
    assert serve.status().applications["embedloom"].status == "RUNNING"
