"""`embedloom deploy` into an endpoint of a Serve config file: two gateways, two replicas, clients all the while."""

import shutil
import socket
import threading
from collections import Counter

import httpx
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from embedloom.encoder.registry import open_model
from embedloom.errors import ConfigError
from embedloom.serving.applications import APPLICATION, QUIET, _wait, declared, version_names
from embedloom.serving.rollout.deploy import DeployRequest, deploy
from embedloom.serving.rollout.trial import TrialRules
from fakes import make_tiny_encoder, make_tiny_llama

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RULES = TrialRules(
    watch_seconds=4, min_requests=5, min_compared=5, max_latency_ratio=50, latency_slack_seconds=30
)
WAIT_SECONDS = 300.0
CLIENTS = 8


@pytest.fixture(scope="module")
def url(ray_local, tiny_model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET)
    args = {
        "model_folder": str(tiny_model),
        "served_name": "tiny",
        "serving": {"require_gate": False, "gateways": 2, "request_log": "none", "compute_dtype": "float32"},
        "scaling": {"min_replicas": 2, "max_replicas": 2, "threads": 1},
    }
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "embedloom.serving.app:build",
        "args": args,
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
    _wait(APPLICATION, WAIT_SECONDS)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


class Clients:
    """Clients that ask without pause; what they were answered."""

    def __init__(self, url: str) -> None:
        self.url, self.statuses, self.over = url, Counter(), threading.Event()
        self.said: list[str] = []
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def _ask(self, number: int) -> None:
        with httpx.Client(trust_env=False, timeout=120) as client:
            while not self.over.is_set():
                number += CLIENTS
                body = {"model": "tiny", "input": [f"text {number % 400}", f"other {number % 300}"]}
                try:
                    reply = client.post(f"{self.url}/v1/embeddings", json=body)
                    status, text = reply.status_code, reply.text
                except httpx.HTTPError as error:
                    status, text = 0, repr(error)
                self.statuses[status] += 1
                if status != 200:
                    self.said.append(text[:200])
                self.over.wait(0.02)

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


def fingerprint(url) -> str:
    return httpx.get(f"{url}/v1/models", trust_env=False, timeout=60).json()["data"][0]["fingerprint"]


def replicas() -> dict[str, int]:
    deployments = serve.status().applications[APPLICATION].deployments
    return {name: sum(one.replica_states.values()) for name, one in deployments.items()}


def test_a_new_version_takes_over_in_place_and_no_request_fails(url, tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "next")
    assert replicas() == {"gateway": 2, "encoder": 2}
    with Clients(url) as clients:
        outcome = deploy(DeployRequest(open_model(copy), RULES, share=0.5))
    assert outcome.promoted, outcome.reason
    assert set(clients.statuses) == {200}, (clients.statuses, clients.said[:5])
    assert (
        outcome.window.candidate.requests >= RULES.min_requests
        and outcome.window.compared >= RULES.min_compared
    )
    assert fingerprint(url) == open_model(copy).id
    assert version_names() == [] and replicas() == {"gateway": 2, "encoder": 2}
    (config,) = declared().applications
    assert config.args["model_folder"] == str(copy) and config.args["scaling"]["max_replicas"] == 2


def test_one_that_drifts_is_rolled_back_and_no_request_fails(url, tmp_path):
    before = fingerprint(url)
    other = make_tiny_encoder(make_tiny_llama(tmp_path / "llama", seed=7), tmp_path / "other")
    with Clients(url) as clients:
        outcome = deploy(DeployRequest(open_model(other), RULES, share=0.5))
    assert not outcome.promoted and "drift" in outcome.reason
    assert set(clients.statuses) == {200}, (clients.statuses, clients.said[:5])
    assert fingerprint(url) == before and version_names() == []


def test_a_shadow_answers_nobody(url, tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "shadow")
    with Clients(url) as clients:
        outcome = deploy(DeployRequest(open_model(copy), RULES, shadow=True, stay=True))
    assert not outcome.promoted and set(clients.statuses) == {200}, clients.said[:5]
    assert outcome.window.compared >= RULES.min_compared


def test_vectors_of_another_contract_are_refused_in_place(url, tiny_model):
    with pytest.raises(ConfigError, match="--new-vectors: this endpoint comes from a Serve config file"):
        deploy(DeployRequest(open_model(tiny_model), RULES, new_vectors=True))
