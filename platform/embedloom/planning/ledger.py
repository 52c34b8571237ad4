"""The ledger of a run: actual beside planned, and the speeds that other plans can be calibrated with."""

from dataclasses import replace
from typing import Any

from embedloom.artefacts import Artefact
from embedloom.config.rates import RatesConfig
from embedloom.planning.estimate import workers_of
from embedloom.planning.known import Known, gpus_of
from embedloom.planning.ledger_file import PLAN_FILE, LedgerEntry, RunLedger
from embedloom.planning.schedule import Plan
from embedloom.planning.work import Work, work_of
from embedloom.run import Node, Run
from embedloom.storage import Place
from embedloom.synthesis.prices import prices

_START_SHARE = 0.8  # of the measured seconds, at most, are taken for start-up where the stage does not say
PLAN_VERSION = 1


def build_ledger(
    run: Run, nodes: dict[str, Node], finished: dict[str, Artefact], rates: RatesConfig
) -> RunLedger:
    """What every finished artefact of a run took.

    Args:
        run: the run as it was executed.
        nodes: its graph.
        finished: its finished artefacts by name.
        rates: what start-up costs, and in which unit work is counted.
    """
    planned = read_plan(run.place)
    known = Known(finished)
    first = {
        name: _entry(
            run, nodes[name], artefact, work_of(run, nodes, nodes[name], rates, known), rates, planned
        )
        for name, artefact in finished.items()
    }
    # Once more, with the tokens that were really there instead of the limits.
    measured = Known(finished, RunLedger(run.config.run.name, run.profile_name, first))
    entries = {}
    for name, entry in first.items():
        work = work_of(run, nodes, nodes[name], rates, measured)
        unit, amount = _unit(run, work, entry.device, rates)
        counts = {**entry.counts, **_mfu(entry, work, rates)}
        entries[name] = replace(entry, unit=unit, amount=amount, counts=counts)
    return RunLedger(run.config.run.name, run.profile_name, entries)


def _entry(
    run: Run, node: Node, artefact: Artefact, work: Work, rates: RatesConfig, planned: dict[str, Any]
) -> LedgerEntry:
    workers = workers_of(run, node)
    device = rates.device_of(gpus_of(run) if workers.gpus else None) or "unknown"
    seconds = float(artefact.manifest["seconds"])
    expected = planned.get(node.name, {}).get("seconds")
    return LedgerEntry(
        name=node.name,
        fingerprint=artefact.fingerprint,
        device=device,
        devices=workers.devices,
        unit=None,
        amount=None,
        full_tokens=work.full_tokens,
        seconds=seconds,
        start_seconds=_start(artefact, work, device, seconds, rates),
        counts={key: value for key, value in artefact.counts.items() if not isinstance(value, list)},
        planned_seconds=float(expected) if isinstance(expected, int | float) else None,
    )


def _mfu(entry: LedgerEntry, work: Work, rates: RatesConfig) -> dict[str, float]:
    """Useful FLOPs of real tokens over what the devices could do while they worked; nothing where a peak is not known."""
    device = rates.devices.get(entry.device)
    stepping = float(entry.counts.get("step_seconds") or entry.seconds)
    if (
        device is None
        or device.peak_bf16_tflops is None
        or work.flops is None
        or not stepping
        or not entry.devices
    ):
        return {}
    return {"mfu": round(work.flops / (device.peak_bf16_tflops.value * 1e12 * entry.devices * stepping), 4)}


def _start(artefact: Artefact, work: Work, device: str, seconds: float, rates: RatesConfig) -> float:
    """Seconds that more work would not add: what a training measured around its steps, else the file's word."""
    stepping = artefact.counts.get("step_seconds")
    if isinstance(stepping, int | float):
        return max(0.0, seconds - float(stepping))
    rate = rates.rate_of(work.kind, device, work.base) if work.kind else None
    return min(rate.start_seconds if rate else 0.0, _START_SHARE * seconds)


def _unit(run: Run, work: Work, device: str, rates: RatesConfig) -> tuple[str | None, float | None]:
    """The unit that a stage's time grows with, and how much of it there was."""
    if work.kind == "synthesize" and run.config.synthesis is not None:
        return "tokens", float(sum(one.output_tokens for one in prices(run.config.synthesis, False)))
    rate = rates.rate_of(work.kind, device, work.base) if work.kind else None
    if rate is not None and rate.mfu is None and rate.per_second is None:
        return None, None
    order = [rate.unit] if rate is not None else []
    for unit in (*order, "tokens", "rows", "scores", "bytes"):
        amount = work.amount(unit)
        if amount is not None:
            return unit, amount
    return None, None


def read_plan(place: Place) -> dict[str, Any]:
    """Planned stages of ``plan.json``; empty where the run was started without one."""
    if not place.exists(PLAN_FILE):
        return {}
    content = place.read_json(PLAN_FILE)
    stages = content.get("stages") if content.get("version") == PLAN_VERSION else None
    return dict(stages) if isinstance(stages, dict) else {}


def write_plan(place: Place, plan: Plan) -> None:
    """Keep what was predicted before the run; predictions of artefacts that are finished by now stay."""
    stages = read_plan(place)
    for name, one in plan.estimates.items():
        stages[name] = {
            "seconds": one.seconds,
            "devices": one.workers.devices,
            "device": one.device,
            "device_hours": one.device_hours,
            "cost": plan.cost(name),
            "tokens": one.work.tokens,
            "rows": one.work.rows,
            "source": one.source,
        }
    place.write_json(PLAN_FILE, {"version": PLAN_VERSION, "currency": plan.currency, "stages": stages})
