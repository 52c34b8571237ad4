"""OpenTelemetry traces of requests: off unless ``serving.traces`` is set, and then of those that are sampled.

What a request spends its time on is measured anyway, for the metrics; a span is a name for it. So nothing is recorded while a request
runs but a few times, and the spans are made when it is over, in the process that answers HTTP: replicas know nothing of traces.
No key, no text and no header but ``traceparent`` and ``tracestate`` becomes part of a span.
"""

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from embedloom.config.serving import TracesConfig
from embedloom.errors import MissingDependency
from embedloom.serving.messages import EncodeResult

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_PARENTS = (b"traceparent", b"tracestate")
_EXTRA = "traces"
_FLUSH_MILLISECONDS = 2000


def check_installed() -> None:
    """Return where the packages of the extra are there.

    Raises:
        MissingDependency: one is not.
    """
    needed = {
        "opentelemetry.sdk": "opentelemetry-sdk",
        "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    }
    for module, package in needed.items():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of what it lies in
            found = None
        if found is None:
            raise MissingDependency(package, _EXTRA, "serving.traces")


@dataclass(slots=True)
class Step:
    """One part of a request; times are Unix nanoseconds."""

    name: str
    started: int
    ended: int
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Trace:
    """A request that is traced."""

    span: Any  # opentelemetry.trace.Span
    started: int
    steps: list[Step] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Thirty-two hex digits, as in ``traceparent``."""
        return f"{self.span.get_span_context().trace_id:032x}"

    def encoded(self, result: EncodeResult, asked: int) -> None:
        """Note where the time of an encode call went, which began at ``asked`` and ends now.

        The encoder's clock may be another machine's: its durations count, laid behind one another. What is left is computing, the way
        to the replica and back included.
        """
        tokenized = asked + int(result.tokenize_seconds * 1e9)
        begun, now = tokenized + int(result.queue_seconds * 1e9), time.time_ns()
        own = {"embedloom.lane": result.lane, "embedloom.tokens": result.tokens}
        self.steps += [
            Step("tokenise", asked, min(tokenized, now)),
            Step("queue", min(tokenized, now), min(begun, now), {"embedloom.lane": result.lane}),
            Step("encode", min(begun, now), now, {**own, "embedloom.items": len(result.vectors)}),
        ]
        if result.replica:
            self.steps[-1].attributes["embedloom.replica"] = result.replica

    def step(self, name: str, seconds: float) -> None:
        """Note a part that took so long and ends now."""
        now = time.time_ns()
        self.steps.append(Step(name, now - int(seconds * 1e9), now))


class Tracing:
    """Makes spans of requests; one a process that answers HTTP."""

    def __init__(self, provider: "TracerProvider") -> None:
        """Over a provider, which has the sampler and the exporter."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._provider = provider
        self._tracer = provider.get_tracer("embedloom.serving")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def of(
        cls, config: TracesConfig, served_name: str, process: str, exporter: "SpanExporter | None" = None
    ) -> "Tracing":
        """As a config wants it.

        Args:
            config: where spans go, and of which requests.
            served_name: of the endpoint.
            process: which of several it is.
            exporter: in place of the config's.

        Raises:
            MissingDependency: the extra is not installed.
        """
        check_installed()
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        names = {
            "service.name": config.service_name,
            "service.instance.id": process,
            "embedloom.model": served_name,
        }
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.share)),
            resource=Resource.create({name: value for name, value in names.items() if value}),
        )
        provider.add_span_processor(BatchSpanProcessor(exporter or _otlp(config.endpoint)))
        return cls(provider)

    def begin(self, headers: Mapping[bytes, bytes], method: str) -> Trace | None:
        """A request begins; None where it is not sampled."""
        carrier = {name.decode(): headers[name].decode("latin-1") for name in _PARENTS if name in headers}
        started = time.time_ns()
        span = self._tracer.start_span(
            method,
            context=self._propagator.extract(carrier)
            if carrier
            else self._api.set_span_in_context(self._api.INVALID_SPAN),
            kind=self._api.SpanKind.SERVER,
            start_time=started,
        )
        return Trace(span, started) if span.is_recording() else None

    def end(
        self, trace: Trace, method: str, route: str, status: int, request_id: str, facts: Mapping[str, Any]
    ) -> None:
        """A request is over: its spans are made and handed to the exporter's thread."""
        ended = time.time_ns()
        span, steps = trace.span, trace.steps
        if steps:
            # Before the first step the body is read and the request admitted; behind the last the reply is written and sent.
            steps = [
                Step("admission", trace.started, steps[0].started),
                *steps,
                Step("reply", steps[-1].ended, ended),
            ]
        inside = self._api.set_span_in_context(span)
        for step in steps:
            child = self._tracer.start_span(
                step.name, context=inside, attributes=step.attributes, start_time=step.started
            )
            child.end(end_time=step.ended)
        span.update_name(f"{method} {route}")
        span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "embedloom.request_id": request_id,
                **{
                    f"embedloom.{name}": value
                    for name, value in facts.items()
                    if isinstance(value, (int, str))
                },
            }
        )
        if status >= 500:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR))
        span.end(end_time=ended)

    def close(self) -> None:
        """Hand over what is left, within two seconds, and end the exporter's thread."""
        self._provider.force_flush(_FLUSH_MILLISECONDS)
        self._provider.shutdown()


def _otlp(endpoint: str | None) -> "SpanExporter":
    """OTLP over HTTP; without an endpoint as OpenTelemetry's own variables say, else to this machine."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint)
