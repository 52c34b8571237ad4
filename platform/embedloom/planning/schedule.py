"""The whole plan: what stages together take, cost and leave idle."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedloom.config.rates import RatesConfig
from embedloom.planning.estimate import Estimate, estimate
from embedloom.planning.known import Known
from embedloom.run import Node, Run


@dataclass(frozen=True, slots=True)
class Plan:
    """Estimates of all artefacts, in the order they are built, and their sums."""

    estimates: dict[str, Estimate]
    inputs: dict[str, tuple[str, ...]]
    prices: dict[str, float]  # device -> price of one hour
    currency: str
    machine_gpus: int  # of the whole profile
    peaks: dict[str, float]  # device -> FLOP/s

    def mfu(self, name: str) -> float | None:
        """Useful FLOPs over what the devices could do in the predicted time; None where either is not known."""
        one = self.estimates[name]
        peak = self.peaks.get(str(one.device))
        if peak is None or one.work.flops is None or not one.seconds:
            return None
        return one.work.flops / (peak * one.workers.devices * one.seconds)

    @property
    def is_bound(self) -> bool:
        """Whether some stage's size is only known to be at least so much."""
        return any(one.work.is_bound for one in self.estimates.values())

    @property
    def seconds(self) -> float:
        """Wall time of what could be estimated; stages run one after another."""
        return sum(one.seconds or 0.0 for one in self.estimates.values())

    @property
    def unknown(self) -> list[str]:
        """Artefacts without an estimate."""
        return [name for name, one in self.estimates.items() if one.seconds is None]

    @property
    def gpu_hours(self) -> float:
        """GPU-hours in which a GPU has a stage's actor or worker on it."""
        return sum(one.device_hours or 0.0 for one in self.estimates.values() if one.workers.gpus)

    @property
    def held_gpu_hours(self) -> float:
        """GPU-hours of all GPUs of the profile over the whole run."""
        return self.machine_gpus * self.seconds / 3600

    def cost(self, name: str) -> float | None:
        """What the devices that work on one artefact cost; None where price or time is not known."""
        one = self.estimates[name]
        hours, price = one.device_hours, self.prices.get(str(one.device))
        return None if hours is None or price is None else hours * price

    @property
    def total_cost(self) -> float:
        """Sum of the known costs."""
        return sum(self.cost(name) or 0.0 for name in self.estimates)

    def idle_gpu_hours(self) -> dict[str, float]:
        """GPU-hours in which the profile's other GPUs wait, by artefact; small ones included."""
        if not self.machine_gpus:
            return {}
        return {
            name: (self.machine_gpus - one.workers.gpus) * one.seconds / 3600
            for name, one in self.estimates.items()
            if one.seconds is not None and one.workers.gpus < self.machine_gpus
        }

    def critical_path(self) -> tuple[list[str], float]:
        """The longest chain of artefacts that wait for each other, and its seconds.

        No cluster of whatever size ends sooner with the same pools per stage: side by side, candidates cost no more
        time than the slowest of them.
        """
        best: dict[str, tuple[float, list[str]]] = {}
        for name, one in self.estimates.items():
            before = [best[parent] for parent in self.inputs[name] if parent in best]
            seconds, chain = max(before, key=lambda found: found[0], default=(0.0, []))
            best[name] = (seconds + (one.seconds or 0.0), [*chain, name])
        seconds, chain = max(best.values(), key=lambda found: found[0], default=(0.0, []))
        return chain, seconds


def make_plan(
    run: Run,
    nodes: dict[str, Node],
    rates: RatesConfig,
    known: Known,
    without: Mapping[str, Any] | None = None,
) -> Plan:
    """Estimate every artefact but those ``without``, which are finished."""
    left = {name: node for name, node in nodes.items() if name not in (without or {})}
    prices = {
        name: device.price_per_hour.value
        for name, device in rates.devices.items()
        if device.price_per_hour is not None
    }
    return Plan(
        {name: estimate(run, nodes, node, rates, known) for name, node in left.items()},
        {name: node.inputs for name, node in left.items()},
        prices,
        rates.currency,
        run.profile.total_gpus,
        {
            name: device.peak_bf16_tflops.value * 1e12
            for name, device in rates.devices.items()
            if device.peak_bf16_tflops is not None
        },
    )
