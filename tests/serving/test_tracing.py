"""Traces: one a request, below the caller's; what its spans say, and what never stands in them."""

import contextlib
import gzip
import hashlib
import itertools
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from embedloom.config.base import validate
from embedloom.config.serving import ApplicationArgs, ServingConfig, TracesConfig
from embedloom.errors import ConfigError, MissingDependency
from embedloom.serving import tracing as module
from embedloom.serving.api import create_api
from embedloom.serving.app import build_application
from embedloom.serving.front import ApiKey
from embedloom.serving.schemas import CorpusCard, SearchHit
from embedloom.serving.tracing import Tracing
from fakes_serving import FakeEncoder, service_of, settings_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
STEPS = ["admission", "tokenise", "queue", "encode", "reply"]
KEY = "sk-of-these-tests"


OPEN = contextlib.ExitStack()


@pytest.fixture(autouse=True)
def closed():
    yield
    OPEN.close()


class OneDocument:
    card = CorpusCard(documents=1, dimension=8, index="exact", texts=True)
    contract_hash = FakeEncoder(limit=128).contract.hash

    def search(self, query, count, with_texts, words=None):
        return [SearchHit(id="d", score=0.5)]


class Site:
    """An application whose spans are kept."""

    def __init__(self, share=1.0, encoder=None, **settings) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing.of(TracesConfig(share=share), "tiny", "g1", self.exporter)
        self.encoder = encoder or FakeEncoder(limit=128)
        api = create_api(
            service_of(self.encoder), settings_of(**settings), corpus=OneDocument(), tracing=self.tracing
        )
        self.client = OPEN.enter_context(TestClient(api, raise_server_exceptions=False))

    def ask(self, body=None, path="/v1/embeddings", **headers):
        return self.client.post(path, json={"model": "tiny", "input": "ab", **(body or {})}, headers=headers)

    def spans(self) -> list:
        self.tracing._provider.force_flush()
        return sorted(self.exporter.get_finished_spans(), key=lambda span: (span.start_time, span.end_time))


def children(spans):
    (root,) = [span for span in spans if span.kind == SpanKind.SERVER]
    below = [span for span in spans if span is not root]
    assert all(span.parent.span_id == root.context.span_id for span in below)
    return root, below


def test_a_request_is_a_span_below_its_callers_with_a_span_for_each_of_its_parts():
    site = Site(encoder=FakeEncoder(limit=128, delay_seconds=0.05))
    assert site.ask(traceparent=SAMPLED).status_code == 200
    root, below = children(site.spans())
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == PARENT
    assert root.name == "POST /v1/embeddings"
    assert [span.name for span in below] == STEPS
    # Behind one another, without a gap, over all of the request.
    assert below[0].start_time == root.start_time and below[-1].end_time == root.end_time
    for before, after in itertools.pairwise(below):
        assert before.end_time == after.start_time
    encode = below[3]
    assert encode.end_time - encode.start_time >= 0.05e9
    assert dict(encode.attributes) == {"embedloom.lane": "query", "embedloom.tokens": 3, "embedloom.items": 1}
    said = dict(root.attributes)
    assert said["http.response.status_code"] == 200 and said["http.route"] == "/v1/embeddings"
    assert root.resource.attributes["service.name"] == "embedloom"
    assert root.resource.attributes["service.instance.id"] == "g1"


def test_a_search_has_a_span_of_its_own():
    site = Site()
    assert site.client.post("/v1/search", json={"query": "ab"}).status_code == 200
    _, below = children(site.spans())
    assert [span.name for span in below] == [*STEPS[:-1], "search", "reply"]


def test_who_is_traced_is_the_callers_decision_else_a_share():
    site = Site(share=0.0)
    for headers in ({}, {"traceparent": UNSAMPLED}, {"traceparent": "no such thing"}):
        assert site.ask(**headers).status_code == 200
    assert site.spans() == []
    site.ask(traceparent=SAMPLED)
    assert len(site.spans()) == 6
    site = Site(share=0.25)
    for _ in range(400):
        site.ask({"input": ""})
    assert 50 < len(site.spans()) < 150  # 100 of 400: five standard deviations


def test_refused_and_failed_requests_are_traced_too():
    site = Site()
    site.ask({"input": ""})
    (refused,) = site.spans()
    assert refused.attributes["http.response.status_code"] == 400
    assert refused.status.status_code == StatusCode.UNSET  # the client's fault
    site = Site()
    site.encoder.failure = RuntimeError("a secret of the machine")
    site.ask()
    (failed,) = site.spans()
    assert (
        failed.attributes["http.response.status_code"] == 500
        and failed.status.status_code == StatusCode.ERROR
    )
    site = Site()
    site.client.get("/health"), site.client.get("/metrics"), site.client.get("/ready")
    assert site.spans() == []


def test_no_key_and_no_text_stands_in_a_span():
    key = ApiKey(name="tests", sha256=hashlib.sha256(KEY.encode()).hexdigest())
    site = Site(keys=(key,), request_log="texts")
    for header in (
        {"authorization": f"Bearer {KEY}"},
        {"api-key": KEY},
        {"authorization": "Bearer wrong-secret"},
    ):
        site.ask(
            {"input": "a private text"}, baggage=KEY, tracestate="vendor=state", traceparent=SAMPLED, **header
        )
    site.client.post(f"/v1/{KEY}", json={}, headers={"api-key": KEY})
    spans = site.spans()
    assert len(spans) == 2 * 6 + 2
    told = "".join(span.to_json() for span in spans)
    for secret in (KEY, key.sha256, "wrong-secret", "a private text", "tests"):
        assert secret not in told


def test_the_log_names_the_trace(caplog):
    import json
    import logging

    site = Site(request_log="facts")
    with caplog.at_level(logging.INFO, "embedloom.serving.requests"):
        site.ask(traceparent=SAMPLED)
        site.ask(traceparent=UNSAMPLED)
    traced, plain = (json.loads(record.message) for record in caplog.records)
    assert traced["trace_id"] == TRACE and "trace_id" not in plain


def test_without_traces_nothing_is_imported_and_nothing_made(monkeypatch):
    monkeypatch.setattr(module.Tracing, "begin", lambda *_: pytest.fail("began"))
    api = create_api(service_of(FakeEncoder()), settings_of())
    with TestClient(api) as client:
        reply = client.post(
            "/v1/embeddings", json={"model": "tiny", "input": "a"}, headers={"traceparent": SAMPLED}
        )
        assert reply.status_code == 200
    import subprocess

    code = (
        "import sys, embedloom.serving.api; sys.exit(any(n.startswith('opentelemetry') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_collector_gets_the_spans_by_otlp():
    """By OpenTelemetry's own exporter, read with its own protocol."""
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
        tracing = Tracing.of(TracesConfig(endpoint=endpoint, share=1, service_name="search"), "tiny", "g1")
        api = create_api(service_of(FakeEncoder()), settings_of(), tracing=tracing)
        with TestClient(api) as client:
            client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
        tracing.close()
    finally:
        server.shutdown()
    ((path, request),) = received
    assert path == "/v1/traces"
    resource = {a.key: a.value.string_value for a in request.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "search"
    names = [span.name for span in request.resource_spans[0].scope_spans[0].spans]
    assert sorted(names) == sorted([*STEPS, "POST /v1/embeddings"])


def test_a_collector_that_is_gone_costs_no_request(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # seconds that the exporter's thread tries
    tracing = Tracing.of(TracesConfig(endpoint="http://127.0.0.1:9/v1/traces", share=1), "tiny", "g1")
    api = create_api(service_of(FakeEncoder()), settings_of(), tracing=tracing)
    with TestClient(api) as client:
        for _ in range(20):
            assert client.post("/v1/embeddings", json={"model": "tiny", "input": "a"}).status_code == 200
    tracing.close()


@pytest.mark.parametrize(
    ("values", "words"), [({"endpoint": "collector:4318"}, "endpoint"), ({"share": 2}, "share")]
)
def test_wrong_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        validate(ServingConfig, {"traces": values}, "serving")


def test_a_missing_extra_is_named_before_anything_starts(monkeypatch, tiny_model):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    serving = ServingConfig(require_gate=False, traces=TracesConfig())
    args = ApplicationArgs(model_folder=str(tiny_model), served_name="t", serving=serving)
    with pytest.raises(MissingDependency, match=r"embedloom\[traces\]"):
        build_application(args)
