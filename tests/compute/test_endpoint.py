"""The endpoint worker against a real HTTP server that refuses, breaks off, answers late and counts what it is asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedloom.compute import endpoint as module
from embedloom.compute.endpoint import EndpointWorker, Ledger, money_spent, request_body
from embedloom.compute.generation import (
    ANSWERS,
    GenerationRequest,
    GenerationResult,
    read_results,
    request_table,
)
from embedloom.compute.journal import AnswerJournal
from embedloom.config.synthesis import EndpointConfig, EngineOptions
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, StageError
from fakes_chat import ChatServer, chat_server, completion, half_an_answer, in_turn, refusal

SCHEMA = {
    "type": "object",
    "properties": {"query": {"type": "string", "maxLength": 80}},
    "required": ["query"],
    "additionalProperties": False,
}
MESSAGES = (
    {"role": "system", "content": "Antworte in JSON."},
    {"role": "user", "content": "Où est le café ?"},
)
PRICES = {"input_price": 2.0, "output_price": 10.0}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)


def requests(count: int, start: int = 0) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"r{n}", MESSAGES, n, 50, 0.7, 0.9, SCHEMA) for n in range(start, start + count)
    ]


def worker(
    server: ChatServer | str, folder: Path, options: EngineOptions | None = None, **settings: Any
) -> EndpointWorker:
    url = server if isinstance(server, str) else server.url
    values = {"url": url, "model": "big", **settings}
    ledger = Ledger(Place(str(folder)), "answers", "money", "synthesis.generators.0.endpoint")
    return EndpointWorker(EndpointConfig.model_validate(values), options or EngineOptions(), ledger)


def ask(one: EndpointWorker, asked: list[GenerationRequest]) -> list[GenerationResult]:
    return read_results(one(request_table(asked))[ANSWERS])


def test_every_request_is_answered_in_order_beside_its_own_columns(tmp_path: Path):
    with chat_server() as server:
        one = worker(server, tmp_path)
        table = request_table(requests(20)).append_column("n", pa.array(range(20)))
        answered = one(table)[ANSWERS]
        one.close()
    assert answered.column("n").to_pylist() == list(range(20))
    found = read_results(answered)
    assert [result.id for result in found] == [f"r{n}" for n in range(20)]
    assert {(result.finish_reason, result.prompt_tokens, result.output_tokens) for result in found} == {
        ("stop", 100, 20)
    }
    assert len({json.loads(result.text)["query"] for result in found}) == 20
    assert server.asked == {f"embedloom-r{n}": 1 for n in range(20)}
    body = next(body for body in server.bodies if body["seed"] == 7)
    assert body == {
        "model": "big", "messages": list(MESSAGES), "temperature": 0.7, "top_p": 0.9, "max_tokens": 50, "seed": 7,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
    }  # fmt: skip
    assert all("authorization" not in headers for headers in server.headers)


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: refusal(429, "slow down", **{"Retry-After": "0.01"}),
        lambda: refusal(500, "oops"),
        lambda: refusal(503, "overloaded"),
        half_an_answer,
        lambda: completion(None).__class__({"choices": []}),
    ],
    ids=["429", "500", "503", "half a body", "no choice"],
)
def test_what_may_pass_is_repeated_and_each_row_is_had_once(tmp_path: Path, trouble):
    with chat_server(behaviour=in_turn(*[trouble] * 12)) as server:
        found = ask(worker(server, tmp_path), requests(30))
    assert all(result.error is None for result in found)
    assert server.answered == {f"embedloom-r{n}": 1 for n in range(30)}
    assert sum(server.asked.values()) == 42


def test_slow_answers_and_broken_connections_are_repeated(tmp_path: Path):
    with chat_server(seconds=5) as server:
        slow = worker(server, tmp_path, timeout_seconds=0.2, max_retries=1)
        with pytest.raises(StageError, match=r"no answer after 2 tries \(no answer within 0\.2 s\)$"):
            ask(slow, requests(1))
    gone = worker("http://127.0.0.1:9/v1", tmp_path, max_retries=1)
    with pytest.raises(StageError, match=r"no answer after 2 tries \(ConnectError"):
        ask(gone, requests(1))


def test_requests_in_flight_settle_at_what_the_server_takes(tmp_path: Path):
    """It takes four and pushes back the others; far more pushing back than the tries that a failing server would get."""
    with chat_server(seconds=0.02, capacity=4) as server:
        one = worker(server, tmp_path, max_retries=2)
        found = ask(one, requests(150))
    assert all(result.error is None for result in found)
    assert max(server.answered.values()) == 1 and server.most_in_flight == 4
    assert one._asker.pace.limit < 8, "it began with eight"


def test_refused_requests_are_results_of_their_own_and_a_server_that_refuses_all_is_a_mistake(tmp_path: Path):
    def long_ones(server, body, key):
        return refusal(400, "prompt too long") if body["seed"] % 3 == 0 else None

    with chat_server(behaviour=long_ones) as server:
        found = ask(worker(server, tmp_path), requests(9, start=1))
    assert [result.error for result in found] == [
        "HTTP 400: prompt too long" if n % 3 == 0 else None for n in range(1, 10)
    ]
    assert max(server.asked.values()) == 1, "a refusal is not repeated"
    with (
        chat_server(behaviour=lambda *_: refusal(400, "unknown field seed")) as server,
        pytest.raises(ConfigError, match=r"HTTP 400: unknown field seed; it refused all of 8 .*send_seed"),
    ):
        ask(worker(server, tmp_path / "other"), requests(30))
    assert sum(server.asked.values()) < 30


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (401, None, ConfigError, "the key is taken from api_key_env: 'CHAT_KEY'"),
        (404, None, ConfigError, "model is 'big', url must end where /chat/completions follows"),
        (402, None, StageError, "answers that were paid for count"),
        (429, "insufficient_quota", StageError, "answers that were paid for count"),
    ],
)
def test_what_cannot_pass_ends_at_once_and_no_message_or_file_has_the_key(
    tmp_path: Path, monkeypatch, caplog, status: int, code: str | None, kind, said: str
):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("CHAT_KEY", "sk-secret-0815")
    echo = lambda *_: refusal(status, "bad key sk-secret-0815", code)  # noqa: E731
    with chat_server(behaviour=echo) as server:
        one = worker(server, tmp_path, api_key_env="CHAT_KEY", max_concurrency=1)
        with pytest.raises(kind) as caught:
            ask(one, requests(20))
    assert said in str(caught.value) and "***" in str(caught.value)
    assert server.headers[0]["authorization"] == "Bearer sk-secret-0815"
    assert len(server.bodies) == 1
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "secret" not in str(caught.value) + caplog.text + kept + repr(one._ledger)


def test_a_key_that_is_not_set_is_named_before_anything_is_sent(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("CHAT_KEY", raising=False)
    with pytest.raises(
        ConfigError, match=r"^synthesis.generators.0.endpoint.api_key_env: .*'CHAT_KEY' is not set"
    ):
        worker("http://127.0.0.1:9/v1", tmp_path, api_key_env="CHAT_KEY")


def test_a_server_whose_template_has_no_system_role_is_told_in_the_users_turn(tmp_path: Path):
    def gemma(server, body, key):
        roles = [message["role"] for message in body["messages"]]
        return refusal(400, "System role not supported") if "system" in roles else None

    with chat_server(behaviour=gemma) as server:
        found = ask(worker(server, tmp_path, max_concurrency=1), requests(6))
    assert all(result.error is None for result in found)
    assert sum(server.asked.values()) == 7, "one request told it"
    said = [{"role": "user", "content": "Antworte in JSON.\n\nOù est le café ?"}]
    assert server.bodies[-1]["messages"] == said
    with chat_server(behaviour=gemma) as server:
        ask(worker(server, tmp_path / "other", system_role=False), requests(2))
    assert sum(server.asked.values()) == 2


def test_answers_that_were_had_are_not_asked_again(tmp_path: Path):
    """A process that fails in the middle of a shard, and a line that its end cut."""
    with chat_server(behaviour=in_turn(*[lambda: None] * 6, lambda: refusal(401, "revoked"))) as server:
        with pytest.raises(ConfigError):
            ask(worker(server, tmp_path, max_concurrency=2), requests(20))
        first = dict(server.answered)
        assert 6 <= len(first) < 20
        (journal,) = (tmp_path / "answers").rglob("*.jsonl")
        journal.write_bytes(journal.read_bytes() + b'{"id": "r19", "text": "ha')
        found = ask(worker(server, tmp_path), requests(20))
    assert [result.id for result in found] == [f"r{n}" for n in range(20)]
    assert set(server.answered.values()) == {1}


class TestBudget:
    def test_it_is_never_exceeded_and_a_raised_one_goes_on(self, tmp_path: Path):
        # An answer costs 100 * 2 + 20 * 10 = 400 millionths; its dearest some 300 bytes * 2 + 50 * 10 = 1,100.
        with chat_server() as server:
            with pytest.raises(
                StageError, match=r"endpoint\.budget: 0\.02 does not hold another request: 0\.0"
            ):
                ask(worker(server, tmp_path, budget=0.02, **PRICES), requests(100))
            answers = len(server.answered)
            assert 40 <= answers <= 50
            assert money_spent(Place(str(tmp_path)), "money") == pytest.approx(answers * 400e-6)
            ask(worker(server, tmp_path, budget=1.0, **PRICES), requests(100))
        assert server.answered == {f"embedloom-r{n}": 1 for n in range(100)}
        assert money_spent(Place(str(tmp_path)), "money") == pytest.approx(100 * 400e-6)

    def test_earlier_spending_counts(self, tmp_path: Path):
        with chat_server() as server:
            ask(worker(server, tmp_path, budget=0.005, **PRICES), requests(8))
            with pytest.raises(StageError, match=r"0\.0044? is spent|0\.00\d+ is spent"):
                ask(worker(server, tmp_path, budget=0.005, **PRICES), requests(20, start=8))
        assert sum(server.answered.values()) * 400e-6 <= 0.005

    def test_requests_of_unknown_fate_count_at_their_dearest(self, tmp_path: Path):
        with chat_server(behaviour=in_turn(half_an_answer)) as server:
            ask(worker(server, tmp_path, **PRICES), requests(1))
        body = server.bodies[0]
        prompt = (
            len(json.dumps(body["messages"], ensure_ascii=False).encode())
            + len(json.dumps(body["response_format"]))
            + 32
        )
        dearest = (2 * prompt + 10 * 50) / 1e6
        assert money_spent(Place(str(tmp_path)), "money") == pytest.approx(dearest + 400e-6)

    def test_a_budget_needs_prices(self):
        with pytest.raises(ValueError, match="budget needs input_price and output_price"):
            EndpointConfig(url="http://x/v1", model="m", budget=3)


_KILLED = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[3])
from tests_endpoint_module import worker, ask, requests
one = worker(sys.argv[1], Path(sys.argv[2]), budget=1.0, input_price=2.0, output_price=10.0, max_concurrency=6)
for start in (0, 40):
    ask(one, requests(40, start))
print("done")
"""


def test_a_worker_killed_half_way_asks_nothing_again_but_what_was_in_flight(tmp_path: Path):
    """Killed with -9 twice; what it had claimed of the budget is at least what the server was paid."""
    here = Path(__file__)
    (tmp_path / "tests_endpoint_module.py").write_text(here.read_text())
    paths = [str(tmp_path), str(here.parent.parent), str(here.parents[2] / "platform")]
    command = [sys.executable, "-c", _KILLED]
    with chat_server(seconds=0.05) as server:
        arguments = [server.url, str(tmp_path / "run"), json.dumps(paths)]
        in_flight = 0
        for wanted in (15, 50):
            process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE)
            while sum(server.answered.values()) < wanted and process.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            in_flight += 6
            paid = sum(server.answered.values()) * 400e-6
            assert money_spent(Place(str(tmp_path / "run")), "money") >= paid - 1e-9
        last = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert last.stdout.strip() == "done"
    assert set(server.asked) == {f"embedloom-r{n}" for n in range(80)}
    assert sum(server.asked.values()) - 80 <= in_flight
    assert max(server.asked.values()) <= 3


def test_an_object_stores_journal_is_read_back(tmp_path: Path):
    import fsspec

    place = Place("memory://journal")
    result = GenerationResult("a", "température", "stop", 3, 4)
    journal = AnswerJournal(place, "shard")
    for n in range(70):
        journal.add(GenerationResult(f"a{n}", result.text, "stop", n, 4))
    assert len(journal.read()) == 64, "the others are waited for"
    journal.close()
    assert journal.read() == {
        f"a{n}": GenerationResult(f"a{n}", "température", "stop", n, 4) for n in range(70)
    }
    fsspec.filesystem("memory").rm("/journal", recursive=True)


class TestForms:
    def body(self, **settings: Any) -> dict[str, Any]:
        options = settings.pop("options", EngineOptions())
        endpoint = EndpointConfig.model_validate({"url": "http://x/v1", "model": "m", **settings})
        return request_body(requests(1)[0], endpoint, options)

    def test_strict_schemas_have_no_bounds_that_openai_refuses(self):
        stated = self.body(answer_format="json_schema_strict")["response_format"]["json_schema"]
        assert stated["strict"] is True
        assert stated["schema"]["properties"] == {"query": {"type": "string"}}
        assert SCHEMA["properties"]["query"]["maxLength"] == 80, "the schema itself stays"

    @pytest.mark.parametrize("form", ["json_object", "none"])
    def test_without_schemas_the_message_has_it(self, form: str):
        body = self.body(answer_format=form)
        assert body.get("response_format") == ({"type": "json_object"} if form == "json_object" else None)
        assert json.loads(body["messages"][-1]["content"].rpartition("else: ")[2]) == SCHEMA
        assert MESSAGES[-1]["content"] == "Où est le café ?"

    def test_what_a_server_wants_otherwise(self):
        thinking = EngineOptions(
            reasoning_parser="qwen3", reasoning_tokens=200, chat_template_kwargs={"enable_thinking": True}
        )
        body = self.body(
            options=thinking, send_seed=False, token_limit_key="max_completion_tokens",
            extra_body={"reasoning_effort": "low", "temperature": 1},
        )  # fmt: skip
        assert body["max_completion_tokens"] == 250 and "max_tokens" not in body and "seed" not in body
        assert body["chat_template_kwargs"] == {"enable_thinking": True}
        assert (body["reasoning_effort"], body["temperature"]) == ("low", 1)

    @pytest.mark.parametrize(
        ("content", "finish", "text", "error"),
        [
            ('{"a": 1}', "stop", '{"a": 1}', None),
            ('```json\n{"a": 1}\n```', "stop", '{"a": 1}', None),
            ('<think>hm</think>{"a": 1}', "stop", '{"a": 1}', None),
            ("<think>hm, well", "length", "", None),
            ('{"a": ', "length", '{"a": ', None),
            (None, "length", "", None),
            (None, "stop", "", "the model ended before it answered"),
            ("I cannot", "content_filter", "", "the server refused to answer: I cannot"),
        ],
    )
    def test_answers(self, tmp_path: Path, content, finish: str, text: str, error: str | None):
        options = EngineOptions(reasoning_parser="qwen3")
        with chat_server(behaviour=lambda *_: completion(content, finish)) as server:
            (found,) = ask(worker(server, tmp_path, options=options), requests(1))
        assert (found.text, found.error) == (text, error)
        assert found.finish_reason == ("error" if error else "length" if finish == "length" else "stop")
