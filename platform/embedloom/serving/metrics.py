"""The endpoint's own Prometheus metrics, in base units.

The registry of a process that answers HTTP sees every request there and, through the replies, every batch that was computed for
them. Of several gateways, the one that is scraped asks the others (``peers``), so a scrape of ``/metrics`` is complete. Ray's
own ``ray_serve_*`` metrics have their own port.
"""

from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from embedloom.serving.messages import EncodeResult

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 65536, 262144, 1048576)


class EndpointMetrics:
    """Counters and histograms of one endpoint."""

    def __init__(self, everywhere: Callable[[], Awaitable[CollectorRegistry]] | None = None) -> None:
        """Build them; ``everywhere`` gathers those of all gateways."""
        self.registry = CollectorRegistry()
        self.everywhere = everywhere
        self.requests = Counter(
            "embedloom_requests", "Requests answered.", ("path", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "embedloom_request_duration_seconds",
            "From request to reply.",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.ongoing = Gauge(
            "embedloom_requests_ongoing", "Requests not yet answered.", registry=self.registry
        )
        self.items = Histogram(
            "embedloom_request_items", "Inputs per request.", buckets=_ITEMS, registry=self.registry
        )
        self.tokens = Counter(
            "embedloom_tokens",
            "Real tokens embedded, padding not counted.",
            ("side",),
            registry=self.registry,
        )
        self.model_tokens = Counter(
            "embedloom_model_tokens",
            "The same, by the model that embedded them.",
            ("model",),
            registry=self.registry,
        )
        self.truncated = Counter(
            "embedloom_truncated_items", "Inputs cut to the model's limit.", registry=self.registry
        )
        self.tokenize_seconds = self._seconds("tokenize", "Tokenising one request.")
        self.queue_seconds = self._seconds(
            "queue", "From tokenised to the start of the request's first batch.", ("lane",)
        )
        self.search_seconds = self._seconds("search", "Searching the corpus, after the query was embedded.")
        self.batch_seconds = self._seconds("batch", "One forward pass.")
        self.batch_texts = Histogram(
            "embedloom_batch_texts", "Texts per batch.", buckets=_ITEMS, registry=self.registry
        )
        self.batch_tokens = Histogram(
            "embedloom_batch_tokens", "Real tokens per batch.", buckets=_TOKENS, registry=self.registry
        )

    def _seconds(self, name: str, description: str, labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(
            f"embedloom_{name}_duration_seconds",
            description,
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count one reply."""
        self.requests.labels(path, str(status)).inc()
        self.request_seconds.labels(path).observe(seconds)

    def embedded(self, result: EncodeResult, model: str) -> None:
        """Count one request that a model embedded and the batches it reports."""
        self.model_tokens.labels(model).inc(result.tokens)
        self.items.observe(len(result.vectors))
        self.truncated.inc(result.truncated)
        for side, tokens in result.side_tokens.items():
            self.tokens.labels(side).inc(tokens)
        self.tokenize_seconds.observe(result.tokenize_seconds)
        self.queue_seconds.labels(result.lane).observe(result.queue_seconds)
        for batch in result.batches:
            self.batch_seconds.observe(batch.seconds)
            self.batch_texts.observe(batch.texts)
            self.batch_tokens.observe(batch.tokens)

    def embedded_tokens(self) -> int:
        """Tokens embedded so far."""
        samples = (sample for family in self.tokens.collect() for sample in family.samples)
        return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))

    def watch_queue(self, queued_tokens: Callable[[], dict[str, int]]) -> None:
        """Show the tokens that wait, by lane, whenever metrics are asked for; of an encoder in this process."""
        gauge = Gauge(
            "embedloom_queued_tokens", "Tokens that wait for a batch.", ("lane",), registry=self.registry
        )
        for lane in queued_tokens():
            gauge.labels(lane).set_function(lambda lane=lane: queued_tokens()[lane])

    def searched(self, seconds: float) -> None:
        """Count one search of the corpus."""
        self.search_seconds.observe(seconds)

    def render(self) -> bytes:
        """Prometheus text."""
        return bytes(generate_latest(self.registry))

    async def page(self) -> bytes:
        """Prometheus text, of all gateways where there are several."""
        return self.render() if self.everywhere is None else bytes(generate_latest(await self.everywhere()))
