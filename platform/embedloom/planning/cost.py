"""Time and money: the work of each artefact over the rate of its workers, and what the stages take together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embedloom.config.cluster import PoolConfig, TrainingGroup
from embedloom.config.rates import Basis, RatesConfig, Unit, WorkRate
from embedloom.config.reranker import WORKERS as RERANKER_WORKERS
from embedloom.config.run import Node, Run
from embedloom.planning.memory import weight_bytes
from embedloom.planning.training_time import Part, parts_beside, preparation_cores, sourced
from embedloom.planning.work import (
    SEARCH_TYPE,
    Known,
    LedgerEntry,
    Work,
    device_of,
    gpus_of,
    synthetic_rows,
    work_of,
)
from embedloom.synthesis.prices import prices, waves
from embedloom.synthesis.prompts_used import writers


@dataclass(frozen=True, slots=True)
class Workers:
    """Who builds an artefact."""

    label: str  # actors x what each has
    gpus: float
    cores: float

    @property
    def devices(self) -> float:
        """What the rate is multiplied by: GPUs where there are some, else cores."""
        return self.gpus or self.cores


@dataclass(frozen=True, slots=True)
class Estimate:
    """One artefact's line of the plan; None where no rate or no size is known."""

    work: Work
    workers: Workers
    device: str | None
    seconds: float | None
    unit: Unit | None = None
    amount: float | None = None
    source: str = ""  # of the rate, or why there is none
    basis: Basis | None = None  # of the rate
    parts: tuple[Part, ...] = ()  # what the seconds consist of, where that is known

    @property
    def device_hours(self) -> float | None:
        """GPU-hours, or core-hours without GPUs."""
        return None if self.seconds is None else self.seconds * self.workers.devices / 3600


def estimate(run: Run, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known) -> Estimate:
    """Predict one artefact; a measured run's speed is preferred to the file's."""
    work = work_of(run, nodes, node, rates, known)
    workers = workers_of(run, node)
    device = device_of(run, workers.gpus, rates)
    if device is None:
        kind = gpus_of(run)
        source = (
            "the profile does not say which GPUs it has (accelerator)"
            if kind is None
            else f"no device {kind!r} in the rates file"
        )
        return Estimate(work, workers, None, None, source=source)
    if node.name == "synthesis":
        return _synthesis(run, Estimate(work, workers, device, None), node, rates, known)
    entry, base = known.entry(node), Estimate(work, workers, device, None)
    if entry is not None and entry.device == device:
        found = _from_measured(base, entry, known.is_same(entry, node))
        if found is not None:
            return found
    found = _from_rates(base, rates)
    if found.seconds is None or not workers.gpus:
        return found
    return _with_parts(found, _beside(run, found, rates))


def _with_parts(one: Estimate, more: Sequence[Part]) -> Estimate:
    seconds = (one.seconds or 0.0) + sum(part.seconds for part in more)
    return replace(one, seconds=seconds, parts=(*one.parts, *more))


def _beside(run: Run, one: Estimate, rates: RatesConfig) -> list[Part]:
    """What a stage on GPUs takes beside its own speed."""
    work = one.work
    if work.steps is not None:
        computing = next((part.seconds for part in one.parts if part.name == "computing"), 0.0)
        return parts_beside(run, rates, rates.devices[str(one.device)], work.steps, computing)
    models = {
        "mining": [teacher.model for teacher in run.config.mining.teachers if teacher.engine != "openai"],
        "rescoring": [run.config.mining.rescoring.model] if run.config.mining.rescoring else [],
    }.get(work.name, [])
    return [*_fetching(models, rates), *(_gathering(work, rates) if work.name == "mining" else [])]


def _gathering(work: Work, rates: RatesConfig) -> list[Part]:
    """One task puts the pairs into one table before a teacher is opened."""
    device = rates.device_of(None)
    rate = None if device is None else rates.rate_of("gather", device, None)
    if rate is None or not rate.per_second or work.rows is None:
        return []
    return [Part("gathering pairs", work.rows / rate.per_second, rate.basis, rate.source)]


def _fetching(models: Sequence[str], rates: RatesConfig) -> list[Part]:
    """Every node fetches the models that it opens; the sizes of some may not be known."""
    sizes = [size for model in models if (size := weight_bytes(rates, model)) is not None]
    if not sizes or rates.download_gb_per_second is None:
        return []
    speed = rates.download_gb_per_second
    return [sourced("fetching models", sum(sizes) / (speed.value * 1e9), speed)]


def _from_rates(base: Estimate, rates: RatesConfig) -> Estimate:
    work, device = base.work, str(base.device)
    rate = rates.rate_of(work.kind, device, work.base) if work.kind else None
    if rate is None:
        return _with(
            base, None, None, None, f"no rate of {work.kind} by {work.base} on {device} in the rates file"
        )
    if rate.mfu is None and rate.per_second is None:
        return replace(_with(base, rate.start_seconds, None, None, rate.source), basis=rate.basis)
    amount = work.amount(rate.unit)
    if amount is None:
        reason = work.basis or f"{rate.unit} unknown: the shape of {work.base} is not in the rates file"
        return _with(base, None, rate.unit, None, reason)
    searching = _searching(base, rates) if rate.mfu is not None else None
    if searching is not None:
        amount -= work.search_flops
    computing = amount / (_speed(rate, rates) * base.workers.devices)
    parts = [
        Part("starting", rate.start_seconds, rate.basis, rate.source),
        Part("computing", computing, rate.basis, rate.source),
        *([] if searching is None else [searching]),
    ]
    if work.search_flops and rate.mfu is not None and searching is None:
        return _with(
            base, None, rate.unit, amount, f"no rate of search in {SEARCH_TYPE} on {device} in the rates file"
        )
    seconds = sum(part.seconds for part in parts)
    amount += work.search_flops if searching is not None else 0.0
    return replace(_with(base, seconds, rate.unit, amount, rate.source), basis=rate.basis, parts=tuple(parts))


def _searching(base: Estimate, rates: RatesConfig) -> Part | None:
    """Exact search, in the type that it computes in; None where there is none, or no rate."""
    device = rates.devices[str(base.device)]
    rate = rates.rate_of("search", str(base.device), None)
    peak = device.peak_float32_tflops if SEARCH_TYPE == "float32" else device.peak_bf16_tflops
    if not base.work.search_flops or rate is None or rate.mfu is None or peak is None:
        return None
    seconds = base.work.search_flops / (rate.mfu * peak.value * 1e12 * base.workers.devices)
    return Part(f"searching in {SEARCH_TYPE}", seconds, rate.basis, rate.source)


def _speed(rate: WorkRate, rates: RatesConfig) -> float:
    """Units one device does in a second."""
    peak = rates.devices[rate.device].peak_bf16_tflops
    if rate.mfu is not None and peak is not None:
        return rate.mfu * peak.value * 1e12
    return float(rate.per_second or 0.0)


def _from_measured(base: Estimate, entry: LedgerEntry, same: bool) -> Estimate | None:
    """Start-up as measured, the rest in proportion to the work and against the number of devices."""
    source = f"measured: {entry.name}"
    base = replace(base, basis="measured")
    unit = next((one for one in ("rows", "tokens", "bytes", "flops", "scores") if one == entry.unit), None)
    amount = base.work.amount(unit) if unit else None
    if unit and amount is not None and entry.amount:
        ratio = amount / entry.amount * entry.devices / base.workers.devices
        return _with(
            base, entry.start_seconds + (entry.seconds - entry.start_seconds) * ratio, unit, amount, source
        )
    if unit is None or same:
        return _with(base, entry.seconds, None, None, source)
    return None


def _with(
    base: Estimate, seconds: float | None, unit: Unit | None, amount: float | None, source: str
) -> Estimate:
    return replace(base, seconds=seconds, unit=unit, amount=amount, source=source)


def _synthesis(run: Run, base: Estimate, node: Node, rates: RatesConfig, known: Known) -> Estimate:
    """By ``synthesis.prices``, wave after wave; each wave takes as long as its slowest generator."""
    config, pool = run.config.synthesis, run.profile.stages.synthesis
    assert config is not None  # noqa: S101 - the node exists only with the section
    found = {price.model: price for price in prices(config, base.workers.gpus > 0)}
    most = float(sum(price.output_tokens for price in found.values()))
    base = replace(
        base, work=replace(base.work, rows=synthetic_rows(run.config), tokens=most, full_tokens=most)
    )
    entry, device = known.entry(node), str(base.device)
    if entry is not None and entry.device == device:
        measured = _from_measured(base, entry, known.is_same(entry, node))
        if measured is not None:
            return measured
    start = rates.rate_of("synthesize", device, None)
    if any(one.endpoint is not None for one in writers(config)):
        return _with(base, None, None, most, "how fast an endpoint answers is not known")
    seconds, parts = 0.0, list[Part]()
    for wave in waves(writers(config), pool):
        slowest = 0.0
        for placed in wave:
            hours = found[placed.generator.model].hours
            if hours is None:
                return _with(base, None, None, most, f"no rate known for {placed.generator.model}")
            slowest = max(slowest, hours * 3600 / (placed.pool.max_actors * max(1.0, placed.pool.gpus)))
        seconds += slowest
        parts += [Part("starting", start.start_seconds, start.basis, start.source)] if start else []
        if base.workers.gpus:
            # Nodes fetch at the same time, so the largest generator of a wave is waited for.
            sizes = {one.generator.model: weight_bytes(rates, one.generator.model) or 0.0 for one in wave}
            parts += _fetching([max(sizes, key=lambda model: sizes[model])], rates)
    parts.insert(0, Part("writing", seconds, "assumed", "output tokens/s of the synthesis lines, at most"))
    seconds = sum(part.seconds for part in parts)
    found_plan = _with(base, seconds, "tokens", most, "at most, see the synthesis lines")
    return replace(found_plan, basis="assumed" if base.workers.gpus else "measured", parts=tuple(parts))


def workers_of(run: Run, node: Node) -> Workers:
    """What the profile lets an artefact's stage take; actor pools are counted at their largest."""
    stages = run.profile.stages
    pools: dict[str, PoolConfig] = {
        "synthesize": stages.synthesis, "mine": stages.mining, "evaluate": stages.evaluation,
        "embed": stages.embedding, "merge": stages.merging,
    }  # fmt: skip
    verb = RERANKER_WORKERS.get(node.name, node.verb)
    if verb == "train":
        return _group(stages.training)
    pool = pools.get(verb)
    if (
        node.name == "corpus" and run.profile.pools
    ):  # tasks on every core; on one machine the small ones are most
        cores = float(preparation_cores(run.profile))
        return Workers(f"{cores:g} cores", 0.0, cores)
    if pool is None:
        return Workers("driver", 0.0, 1.0)
    actors = pool.max_actors
    return Workers(
        _each(actors, "actors", pool.cpus, pool.gpus),
        actors * pool.gpus,
        float(actors * pool.compute_threads),
    )


def _group(group: TrainingGroup) -> Workers:
    gpus = group.workers * group.gpus
    return Workers(
        _each(group.workers, "workers", group.cpus, group.gpus),
        gpus,
        float(group.workers * group.compute_threads),
    )


def _each(count: int, what: str, cpus: float, gpus: float) -> str:
    return f"{count} {what} x {cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")


# The whole plan: what stages together take, cost and leave idle.


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

    def candidates(self) -> dict[str, list[Estimate]]:
        """The training stages of each run, in order; those without an estimate are left out."""
        found: dict[str, list[Estimate]] = {}
        for name, one in self.estimates.items():
            if name.startswith("training/") and one.seconds is not None:
                found.setdefault(name.split("/")[1], []).append(one)
        return found

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
    estimates = {name: estimate(run, nodes, node, rates, known) for name, node in left.items()}
    estimates, inputs = _with_preparation(
        run, estimates, {name: node.inputs for name, node in left.items()}, rates
    )
    return Plan(
        _with_node_starts(run, estimates, rates),
        inputs,
        prices,
        rates.currency,
        run.profile.total_gpus,
        {
            name: device.peak_bf16_tflops.value * 1e12
            for name, device in rates.devices.items()
            if device.peak_bf16_tflops is not None
        },
    )


PREPARATION = "preparation"  # of training data: no artefact of its own, but a line of the plan


def _with_preparation(
    run: Run, estimates: dict[str, Estimate], inputs: dict[str, tuple[str, ...]], rates: RatesConfig
) -> tuple[dict[str, Estimate], dict[str, tuple[str, ...]]]:
    """A line for the tokens of each training stage, before its first run; the other runs read the same ones.

    On CPUs, and where a run was measured, it is part of what a stage takes to start.
    """
    found, needs, added = dict[str, Estimate](), dict(inputs), set[str]()
    device = rates.device_of(None)
    rate = None if device is None else rates.rate_of("prepare", device, None)
    for name, one in estimates.items():
        stage = one.work.steps.stage.name if one.work.steps is not None else ""
        line = f"{PREPARATION}/{stage}"
        if stage and one.workers.gpus and one.basis != "measured" and rate is not None and one.work.tokens:
            if stage not in added:
                cores = float(preparation_cores(run.profile))
                work = Work(line, "prepare", one.work.base, one.work.rows, tokens=one.work.tokens)
                base = Estimate(work, Workers(f"{cores:g} cores", 0.0, cores), device, None)
                found[line] = _from_rates(base, rates)
                needs[line] = tuple(parent for parent in inputs[name] if not parent.startswith("training/"))
                added.add(stage)
            needs[name] = (*needs[name], line)
        found[name] = one
    return found, needs


_NODES_KEPT_SECONDS = 600  # without work, by the autoscaler of the rendered files


def _with_node_starts(run: Run, estimates: dict[str, Estimate], rates: RatesConfig) -> dict[str, Estimate]:
    """The wait for nodes before the first stage that needs GPUs, and after every stage so long without that they are gone."""
    start = rates.node_start_seconds
    bought = [pool for pool in run.profile.pools.values() if pool.gpus and not pool.min_nodes]
    if start is None or not bought:
        return estimates
    found, held, idle = dict[str, Estimate](), False, 0.0
    for name, one in estimates.items():
        if not one.workers.gpus:
            idle += one.seconds or 0.0
            held = held and idle < _NODES_KEPT_SECONDS
            found[name] = one
            continue
        missing = not held and one.seconds is not None
        found[name] = _with_parts(one, [sourced("buying nodes", start.value, start)]) if missing else one
        held, idle = True, 0.0
    return found
