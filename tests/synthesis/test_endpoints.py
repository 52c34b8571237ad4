"""The stage with generators and a judge behind a real HTTP server: rows, quotas, money, kills, prices, fingerprints."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from embedloom.compute import endpoint as endpoint_module
from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import Artefact
from embedloom.core.schemas import SCHEMAS
from embedloom.core.storage import Place
from embedloom.errors import StageError
from embedloom.synthesis.prices import describe, prices, waves
from embedloom.synthesis.prompts_used import section_state
from embedloom.synthesis.stage import model_sources
from fakes_chat import chat_server, refusal
from fakes_serial import patch_serial
from fakes_synthesis import QUALITY, write_corpus
from fakes_synthesis import pairs_of as rows
from fakes_synthesis import run_stage as run

PRICES = {"input_price": 2.0, "output_price": 10.0}


def section(url: str, **changes: Any) -> SynthesisConfig:
    far = {
        "endpoint": {
            "url": url,
            "model": "org/far-1",
            "max_concurrency": 4,
            **PRICES,
            **changes.pop("endpoint", {}),
        }
    }
    values: dict[str, Any] = {
        "generators": [{"model": "first", "weight": 1}, {**far, "weight": 3}],
        "families": [{"family": "seed_queries", "rows": 40}, {"family": "sts", "rows": 4}],
        "quality": QUALITY,
        "shard_rows": 8,
    }
    return SynthesisConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _serial(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_serial(monkeypatch)
    monkeypatch.setattr(endpoint_module, "_FIRST_PAUSE", 0.01)


def test_an_endpoint_writes_its_share_beside_an_engine(corpus: Artefact, tmp_path: Path):
    with chat_server() as server:
        artefact = run(corpus, tmp_path, section(server.url))
    found = rows(artefact)
    assert Counter(row["generator"] for row in found) == {"first": 11, "org/far-1": 33}
    assert artefact.place.read_tables("pairs").schema.names == list(SCHEMAS["pairs"].columns)
    assert {row["prompt_hash"] for row in found if row["generator"] == "first"} == {
        row["prompt_hash"] for row in found if row["generator"] == "org/far-1"
    }
    answers = sum(server.answered.values())
    cells = [cell for cell in artefact.manifest["details"]["cells"] if cell["generator"] == "org/far-1"]
    assert sum(cell["attempts"] for cell in cells) == answers == len(server.asked)
    assert sum(cell["prompt_tokens"] for cell in cells) == 100 * answers
    assert artefact.manifest["details"]["money"] == {"org/far-1": pytest.approx(answers * 400e-6)}
    assert not artefact.place.exists("steps"), "answers kept on the way are no part of the artefact"


def test_a_judge_behind_an_endpoint_grades(corpus: Artefact, tmp_path: Path):
    judged = {**QUALITY, "judge": {"endpoint": {"url": "", "model": "judge-1"}, "threshold": 6}}
    with chat_server() as server:
        judged["judge"]["endpoint"]["url"] = server.url
        settings = section(
            server.url, quality=judged, generators=[{"model": "first"}], max_attempts_per_row=9
        )
        artefact = run(corpus, tmp_path, settings)
    assert artefact.counts["rows"] == 44
    assert artefact.counts["rejects"]["judge"] > 5
    graded = 44 + artefact.counts["surplus"] + artefact.counts["rejects"]["judge"]
    assert len(server.asked) == sum(server.answered.values()) == graded
    assert {body["model"] for body in server.bodies} == {"judge-1"}
    assert "money" not in artefact.manifest["details"], "it has no prices"


def test_a_used_up_budget_stops_the_stage_and_a_larger_one_goes_on(corpus: Artefact, tmp_path: Path):
    with chat_server() as server:
        with pytest.raises(
            StageError, match=r"synthesis\.generators\.1\.endpoint\.budget: 0\.01 does not hold"
        ):
            run(corpus, tmp_path, section(server.url, endpoint={"budget": 0.01}))
        paid = sum(server.answered.values())
        assert 0 < paid < 33 and paid * 400e-6 <= 0.01
        artefact = run(corpus, tmp_path, section(server.url, endpoint={"budget": 2}))
    assert set(server.answered.values()) == {1}, "nothing was asked twice"
    assert artefact.counts["rows"] == 44
    assert artefact.manifest["details"]["money"]["org/far-1"] == pytest.approx(len(server.answered) * 400e-6)


def test_requests_that_the_server_refuses_are_rejects_with_what_it_says(corpus: Artefact, tmp_path: Path):
    def filtered(server, body, key):
        return refusal(400, "blocked by policy") if body["seed"] % 4 == 0 and server.answered else None

    with chat_server(behaviour=filtered) as server:
        artefact = run(corpus, tmp_path, section(server.url))
    rejects = artefact.place.read_tables("rejects").to_pylist()
    details = {row["detail"] for row in rejects if row["reason"] == "engine_error"}
    assert details == {"HTTP 400: blocked by policy"}
    assert artefact.counts["rows"] == 44


def test_address_pace_price_and_budget_decide_no_row():
    here = section("http://a/v1")
    other = section(
        "https://b:8/v1",
        endpoint={"budget": 5, "max_concurrency": 9, "timeout_seconds": 3, "output_price": 1},
    )
    assert section_state(here, ()) == section_state(other, ())
    for change in ({"model": "org/far-2"}, {"send_seed": False}, {"extra_body": {"reasoning_effort": "low"}}):
        assert section_state(section("http://a/v1", endpoint=change), ()) != section_state(here, ())
    assert list(model_sources(here)) == ["first"], "nothing is fetched for an endpoint"


def test_endpoints_run_beside_the_first_wave_and_take_no_place_in_the_profile():
    pool = PoolConfig(cpus=2)
    both = section("http://a/v1", generators=[
        {"model": "first"}, {"endpoint": {"url": "http://a/v1", "model": "far"}}, {"model": "second"},
    ])  # fmt: skip
    named = [[(one.generator.model, one.pool.cpus) for one in wave] for wave in waves(both.generators, pool)]
    assert named == [[("far", 0.1), ("first", 2)], [("second", 2)]]
    alone = section("http://a/v1", generators=[{"endpoint": {"url": "http://a/v1", "model": "far"}}])
    assert [[one.generator.model for one in wave] for wave in waves(alone.generators, pool)] == [["far"]]


def test_plan_prices_endpoints_in_money():
    config = section(
        "http://a/v1", endpoint={"budget": 0.01}, families=[{"family": "seed_queries", "rows": 40}]
    )
    local, far = prices(config, gpu=False)
    assert (local.endpoint, local.prompt_tokens, far.rate) == (None, 0, None)
    assert (far.answers, far.output_tokens) == (30, 30 * 64)
    assert far.money == pytest.approx((far.prompt_tokens * 2 + 30 * 64 * 10) / 1e6)
    assert 30 * 600 < far.prompt_tokens < 30 * 1200, "2,400 characters of the document, and the prompt's own"
    lines = describe(config, PoolConfig())
    assert any("org/far-1 (endpoint), first (1 x 1 CPU)" in line for line in lines)
    (line,) = (line for line in lines if line.startswith("synthesis: org/far-1: 30 answers"))
    assert line.endswith("at most, budget 0.01 (LESS THAN THAT)")


def test_a_judges_endpoint_is_priced_too():
    judge = {"endpoint": {"url": "http://a/v1", "model": "j", "input_price": 1, "output_price": 1}}
    config = section("http://a/v1", quality={**QUALITY, "judge": judge})
    (line,) = (line for line in describe(config, PoolConfig()) if "judge j" in line)
    assert line.startswith("synthesis: judge j: 44 answers, 2,816 output tokens at most, about ")
    assert line.endswith("in the currency of its prices at most, no budget")


@pytest.mark.ray
def test_on_ray_an_endpoint_writes_too(corpus: Artefact, tmp_path: Path, ray_local: None, monkeypatch):
    monkeypatch.undo()  # of what makes the others serial
    with chat_server() as server:
        artefact = run(corpus, tmp_path, section(server.url, families=[{"family": "sts", "rows": 16}]))
    assert artefact.counts["generators"] == {"first": 4, "org/far-1": 12}
    assert set(server.asked.values()) == {1}
    assert Place(str(tmp_path / "out")).exists("manifest.json")
