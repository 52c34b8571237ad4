"""What several gateways of one endpoint tell each other: what their keys used, and what their metrics say. Light: no Ray is imported.

Each gateway is a process of its own with its own event loop. They share nothing but the replicas behind them, whose queues
admit or refuse (``scheduling``), and what they send each other here. A gateway that dies takes its counters with it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

GATEWAY_LABEL = "gateway"
USAGE_SECONDS = 0.5  # between two messages of a gateway about what its keys used
ANSWER_SECONDS = 2.0  # that another gateway may take to say what its metrics are
Usage = dict[str, tuple[int, int]]  # by key: requests and tokens
Queues = dict[str, tuple[float, dict[str, int]]]  # by replica: seconds since it was said, tokens by lane

logger = logging.getLogger("embedloom.serving")


@dataclass(frozen=True)
class Snapshot:
    """One gateway's metrics, as they are sent."""

    gateway: str
    metrics: list[Metric]
    queues: Queues = field(default_factory=dict)


def snapshot(gateway: str, registry: CollectorRegistry, queues: Queues) -> Snapshot:
    """The metrics of a registry now; ``queues`` is what its gateway knows of the replicas."""
    return Snapshot(gateway, list(registry.collect()), queues)


def merged(snapshots: list[Snapshot], lanes: tuple[str, ...]) -> CollectorRegistry:
    """All gateways' series in one registry, each with a label that says whose it is; what waits at the replicas once.

    Not added up: a sum would fall when a gateway ends, and Prometheus would take that for a new start and count the rest again.
    ``sum without (gateway) (rate(...))`` is right.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(snapshots, lanes))
    return registry


@dataclass(eq=False)  # a registry hashes its collectors
class _Merged(Collector):
    snapshots: list[Snapshot]
    lanes: tuple[str, ...]

    def collect(self) -> Iterator[Metric]:
        """Every metric once, with the samples of all gateways."""
        families: dict[str, Metric] = {}
        for one in self.snapshots:
            for metric in one.metrics:
                family = families.get(metric.name)
                if family is None:
                    family = families[metric.name] = Metric(metric.name, metric.documentation, metric.type)
                family.samples += [
                    sample._replace(labels={**sample.labels, GATEWAY_LABEL: one.gateway})
                    for sample in metric.samples
                ]
        yield from families.values()
        waiting = GaugeMetricFamily(
            "embedloom_queued_tokens", "Tokens that wait for a batch.", labels=["lane"]
        )
        queued = queued_tokens([one.queues for one in self.snapshots], self.lanes)
        for lane in self.lanes:
            waiting.add_metric([lane], queued[lane])
        yield waiting


def queued_tokens(told: list[Queues], lanes: tuple[str, ...]) -> dict[str, int]:
    """Tokens that wait at all replicas, by lane, each replica by the newest that it said to any gateway."""
    newest: Queues = {}
    for queues in told:
        for replica, (age, tokens) in queues.items():
            if replica not in newest or age < newest[replica][0]:
                newest[replica] = age, tokens
    return {lane: sum(tokens.get(lane, 0) for _, tokens in newest.values()) for lane in lanes}


Broadcast = Callable[
    ..., Awaitable[list[Any]]
]  # a method's name and its arguments; the answers of those that gave one


class UsageExchange:
    """Tells the other gateways every ``USAGE_SECONDS`` what the keys used here.

    Until they are told, the others admit as if it had not been used. So all gateways together may admit more than a quota for a
    while: at most what the key's clients send to the others between two messages. What is taken beyond a quota is made up for before more
    is given, so over minutes the rate is the quota's.
    """

    def __init__(self, gateway: str, collect: Callable[[], Usage], broadcast: Broadcast) -> None:
        """Build one.

        Args:
            gateway: this one's name.
            collect: what was used since it was last called.
            broadcast: to all gateways, this one included.
        """
        self._gateway = gateway
        self._collect = collect
        self._broadcast = broadcast
        self._unsent: Usage = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(USAGE_SECONDS)
            await self.tell()

    async def tell(self) -> None:
        """Send what was used, if anything; what could not be sent is sent the next time."""
        self._unsent = added(self._unsent, self._collect())
        if not self._unsent:
            return
        sent, self._unsent = self._unsent, {}
        try:
            await self._broadcast("used_elsewhere", self._gateway, sent)
        except Exception as error:  # whatever became of the others, this one goes on answering
            logger.warning("the other gateways were not told what keys used: %s", error)
            self._unsent = added(sent, self._unsent)


def added(one: Mapping[str, tuple[int, int]], other: Mapping[str, tuple[int, int]]) -> Usage:
    """Both usages together."""
    total: Usage = dict(one)
    for name, (requests, tokens) in other.items():
        before = total.get(name, (0, 0))
        total[name] = before[0] + requests, before[1] + tokens
    return total


async def gathered(own: Snapshot, broadcast: Broadcast) -> list[Snapshot]:
    """The snapshots of all gateways that answer in time; of one that does not, none."""
    found: list[Snapshot] = []
    with contextlib.suppress(Exception):  # whatever became of the others, this one's own are there
        async with asyncio.timeout(ANSWER_SECONDS):
            found = await broadcast("metrics_snapshot")
    others = [one for one in found if one.gateway != own.gateway]
    return sorted([own, *others], key=lambda one: one.gateway)
