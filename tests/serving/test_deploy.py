"""`embedloom deploy` into a running endpoint, and what it refuses before it starts anything."""

import json
import shutil
import socket
import threading
from dataclasses import replace

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.core.prompting import PromptContract
from embedloom.core.trained_prompts import Prompt, TrainedPrompt, trained_contract
from embedloom.encoder.model import Encoder
from embedloom.encoder.parity import GOLDEN_TEXTS
from embedloom.encoder.registry import open_model
from embedloom.errors import ConfigError, ServeError
from embedloom.pipeline.model_commands import trial_rules
from embedloom.serving import address
from embedloom.serving.messages import EncodeResult, ModelInfo, Refusal
from embedloom.serving.rollout.golden import check_golden, expected_vectors
from embedloom.serving.rollout.trial import TrialRules
from fakes import make_tiny_encoder, make_tiny_llama

RULES = TrialRules(watch_seconds=3, min_requests=5, min_compared=5, latency_slack_seconds=5)


def request_of(folder, **changes):
    from embedloom.serving.rollout.deploy import DeployRequest

    return DeployRequest(open_model(folder), RULES, share=0.5, **changes)


def live_args(folder, **serving) -> tuple[ApplicationArgs, ModelInfo]:
    contract = PromptContract.load(folder)
    serving = {"model": str(folder), "require_gate": False, **serving}
    args = ApplicationArgs(
        model_folder=str(folder), model_id="old", served_name="tiny", serving=ServingConfig(**serving)
    )
    return args, ModelInfo(8, contract.hash, 64, 64, True)


def test_the_successor_keeps_all_but_the_model(tiny_model, tmp_path):
    from embedloom.serving.rollout.deploy import successor

    live, info = live_args(tiny_model, max_items=7, port=1234)
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    new = successor(request_of(copy), live, info)
    assert (new.model_folder, new.fingerprint, new.served_name) == (str(copy), open_model(copy).id, "tiny")
    assert (new.serving.max_items, new.serving.port, new.serving.require_gate) == (7, 1234, False)
    assert successor(request_of(copy, require_gate=True), live, info).serving.require_gate
    judged, info = live_args(tiny_model, verdict="of/the/old/one.json")
    assert successor(request_of(copy), judged, info).serving.verdict is None
    assert successor(request_of(copy, verdict="new.json"), judged, info).serving.verdict == "new.json"


def test_another_contract_and_a_corpus_of_the_old_model_are_refused(tiny_model, tmp_path):
    from embedloom.serving.rollout.deploy import successor

    live, info = live_args(tiny_model)
    other = ModelInfo(8, "0" * 16, 64, 64, True)
    with pytest.raises(ConfigError, match=rf"its contract is {info.contract_hash}, .*--new-vectors"):
        successor(request_of(tiny_model), live, other)
    assert (
        successor(request_of(tiny_model, new_vectors=True), live, other).model_id == open_model(tiny_model).id
    )
    searching, info = live_args(tiny_model, corpus="vectors")
    with pytest.raises(ConfigError, match="--corpus: this endpoint searches vectors"):
        successor(request_of(tiny_model), searching, info)


def test_in_place_only_versions_whose_vectors_may_meet(tiny_model):
    from embedloom.serving.rollout.deploy import check_in_place

    live, _ = live_args(tiny_model)
    check_in_place(request_of(tiny_model), live)
    with pytest.raises(ConfigError, match="--new-vectors: this endpoint comes from a Serve config file"):
        check_in_place(request_of(tiny_model, new_vectors=True), live)
    searching, _ = live_args(tiny_model, corpus="vectors")
    with pytest.raises(ConfigError, match="--corpus: this endpoint comes from a Serve config file"):
        check_in_place(request_of(tiny_model), searching)


def test_rules_come_from_the_command_line():
    rules, gate = trial_rules(5, ["min_overlap=0.5", "require_gate=false"])
    assert (rules.watch_seconds, rules.min_overlap, gate) == (5, 0.5, False)
    with pytest.raises(ConfigError, match="nearest valid key is 'min_overlap'"):
        trial_rules(5, ["min_overlp=0.5"])


def test_endpoints_are_found_by_port_and_forgotten_with_their_process(monkeypatch, tmp_path, tiny_model):
    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no endpoint runs on this machine .*embedloom serve"):
        address.find(None)
    address.remember(8001, "http://127.0.0.1:8001", "127.0.0.1:6379")
    assert address.find(None).ray_address == "127.0.0.1:6379"
    result = CliRunner().invoke(app, ["deploy", str(tiny_model), "--dry-run", "--canary", "0.2"])
    assert result.exit_code == 0, result.output
    assert "into http://127.0.0.1:8001, on 20 % of requests" in result.stdout
    second = address.remember(8002, "http://127.0.0.1:8002", "127.0.0.1:6380")
    with pytest.raises(ConfigError, match=r"several endpoints .*: 8001, 8002"):
        address.find(None)
    assert address.find(8002).port == 8002
    second.write_text(json.dumps({**json.loads(second.read_text()), "pid": 2**22 + 1}))  # above any pid
    assert address.find(None).port == 8001 and not second.exists()


def asked(encoder: Encoder, turn: float = 0.0):
    def ask(job):
        (part,) = job.parts
        vectors = encoder.embed(part.texts, part.side, part.task_type)
        vectors = vectors + turn * np.roll(vectors, 1, axis=1)
        return EncodeResult(vectors, {}, "query", "", 0.0, 0.0)

    return ask


def test_golden_vectors_hold_a_live_replica_to_the_export(tiny_model):
    encoder = Encoder.load(tiny_model, dtype="float32")
    expected, dtype = expected_vectors(tiny_model)
    assert expected.shape == (len(GOLDEN_TEXTS), encoder.dimension) and dtype == "float32"
    assert check_golden(asked(encoder), expected, dtype, "float32") > 0.99999
    with pytest.raises(ServeError, match=r"has cosine 0\.9\d+ to the exported one, allowed is 0\.9999"):
        check_golden(asked(encoder, 0.02), expected, dtype, "float32")
    assert check_golden(asked(encoder, 0.02), expected, dtype, "bfloat16") > 0.999
    with pytest.raises(ServeError, match=r"refuses .*no such task"):
        check_golden(lambda _: Refusal("no such task", "invalid_task"), expected, dtype, "float32")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Traffic:
    """Clients that ask without pause; what they were answered."""

    def __init__(self, url: str) -> None:
        self.url, self.failures, self.answers = url, [], 0
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)]

    def _ask(self, number: int) -> None:
        client = httpx.Client(trust_env=False, timeout=60)
        while not self.over.is_set():
            number += 7
            body = {"model": "tiny", "input": [f"text {number % 400} of a client", f"other {number % 300}"]}
            reply = client.post(f"{self.url}/v1/embeddings", json=body)
            self.answers += 1
            if reply.status_code != 200:
                self.failures.append((reply.status_code, reply.text[:200]))
            self.over.wait(0.02)

    def __enter__(self) -> "Traffic":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.ray
@pytest.mark.slow
def test_a_drifted_version_is_taken_away_and_a_sound_one_takes_over_without_a_failed_request(
    ray_local, tiny_model, tmp_path, monkeypatch, request
):
    from ray import serve

    from embedloom.serving.rollout.deploy import deploy
    from embedloom.serving.stage import start_endpoint

    monkeypatch.setenv("EMBEDLOOM_CACHE", str(tmp_path / "cache"))
    sound = shutil.copytree(tiny_model, tmp_path / "sound")
    llama = make_tiny_llama(tmp_path / "llama", seed=1)
    drifted = make_tiny_encoder(llama, tmp_path / "drifted")
    config = ServingConfig(port=free_port(), require_gate=False, request_log="none")
    # As in a Ray of its own, where the replica answers on the command's socket; that Ray then ends, and Serve with it.
    endpoint = start_endpoint(config, tiny_model, "old", "tiny", ServeScaling(threads=1), own_ray=True)
    request.addfinalizer(serve.shutdown)
    with endpoint:
        assert endpoint.listener is not None
        with Traffic(endpoint.url) as traffic:
            refused = deploy(request_of(drifted))
            assert not refused.promoted and refused.reason.startswith("drift: "), refused
            taken = deploy(request_of(sound))
            assert taken.promoted, taken
            seen = traffic.answers
            card = httpx.get(f"{endpoint.url}/v1/models", trust_env=False).json()["data"][0]
            assert card["fingerprint"] == open_model(sound).id
        assert traffic.failures == [] and seen > 50


def test_a_changed_default_instruction_is_another_contract_and_both_texts_are_named(tiny_model, tmp_path):
    from embedloom.serving.rollout.deploy import successor

    shutil.copytree(tiny_model, tmp_path / "next")
    own = PromptContract.load(tiny_model)
    changed = trained_contract(own, [TrainedPrompt(Prompt("retrieval", "Find it", ""), "docs", 1.0)], 1.0)
    changed.save(tmp_path / "next")
    live, info = live_args(tiny_model)
    info = replace(info, instructions=dict(own.instructions))
    with pytest.raises(
        ConfigError, match=r"of retrieval is 'Find it' there, 'Given a question, .*' here\); .*--new-vectors"
    ):
        successor(request_of(tmp_path / "next"), live, info)
    assert successor(request_of(tmp_path / "next", new_vectors=True), live, info)
