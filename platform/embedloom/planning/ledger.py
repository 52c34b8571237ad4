"""The ledger of a run: actual beside planned, the speeds that other plans are calibrated with, and both as text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from embedloom.config.rates import Published, RatesConfig, Sourced
from embedloom.config.run import Node, Run
from embedloom.core.artefacts import Artefact
from embedloom.core.storage import Place
from embedloom.core.tables import text_table
from embedloom.planning.cost import Estimate, Plan, workers_of
from embedloom.planning.memory import Fit
from embedloom.planning.work import PLAN_FILE, Known, LedgerEntry, RunLedger, Work, device_of, work_of
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
    device = device_of(run, workers.gpus, rates) or "unknown"
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


# The prediction as text, for ``plan``, and the ledger beside it.


_IDLE_SHOWN = 3


def prediction_lines(run: Run, plan: Plan, rates: RatesConfig, calibrated: str | None) -> list[str]:
    """A table of the artefacts to build, the sums, the training stages, and where the numbers are from."""
    basis = f"speeds of {calibrated}" if calibrated else "speeds of the rates file"
    head = ("predicted", "rows", "tokens", "FLOPs", "bytes", "devices", "device-hours", "time", plan.currency)
    rows = [head, *(_row(plan, one) for one in plan.estimates.values())]
    lines = [f"prediction by {basis}:", *text_table(rows[0], rows[1:], style=None), *_sums(plan)]
    lines += _training_lines(run, plan, rates)
    return [*lines, *_part_lines(plan), *_candidate_lines(run, plan), *_sources(plan, rates)]


def _row(plan: Plan, one: Estimate) -> tuple[str, ...]:
    work, least = one.work, "≥ " if one.work.is_bound else ""
    sizes = [count(work.rows), count(work.tokens), scaled(work.flops), scaled(work.nbytes)]
    costs = [amount_text(one.device_hours), time_text(one.seconds), amount_text(plan.cost(work.name))]
    devices = f"{one.workers.devices:g} {one.device or '?'}"
    marked = [[text if text == "-" else f"{least}{text}" for text in texts] for texts in (sizes, costs)]
    return (work.name, *marked[0], devices, *marked[1])


def _sums(plan: Plan) -> list[str]:
    chain, longest = plan.critical_path()
    lines = [
        f"one stage after another: {'at least ' if plan.is_bound else ''}{time_text(plan.seconds)}, {amount_text(plan.total_cost)} {plan.currency} for the devices at work",
        f"critical path: {time_text(longest)}: {' > '.join(chain)}",
    ]
    if plan.machine_gpus:
        idle = plan.idle_gpu_hours()
        worst = sorted(idle, key=lambda name: -idle[name])[:_IDLE_SHOWN]
        total = sum(idle.values())
        share = total / plan.held_gpu_hours if plan.held_gpu_hours else 0.0
        where = ", ".join(f"{name} {idle[name]:,.0f}" for name in worst)
        lines.append(
            f"GPUs: {plan.gpu_hours:,.0f} GPU-hours at work; with all {plan.machine_gpus} held all the time "
            f"{total:,.0f} more are idle ({share:.1%}), most in {where or 'none'}"
        )
    if plan.unknown:
        lines.append(f"not predicted, and in no sum: {', '.join(plan.unknown)}")
    return lines


def _training_lines(run: Run, plan: Plan, rates: RatesConfig) -> list[str]:
    """Every training stage once: candidates differ in seeds and mixes, not in size."""
    lines: list[str] = []
    shown: dict[str, Estimate] = {}
    copies: dict[str, int] = {}
    for one in plan.estimates.values():
        if one.work.steps is not None:
            stage = one.work.steps.stage.name
            shown.setdefault(stage, one)
            copies[stage] = copies.get(stage, 0) + 1
    for stage, one in shown.items():
        lines.append(f"training: {_steps_text(one, copies[stage])}; {_cost_text(plan, one)}")
    for published in rates.published:
        if published.base == run.config.encoder.base and set(published.stage_hours) == set(shown):
            lines.append(_published_line(published, shown))
    return lines


def _part_lines(plan: Plan) -> list[str]:
    """What the hours of GPU stages consist of; of equal stages the first one's."""
    lines, shown = [], set[str]()
    for name, one in plan.estimates.items():
        stage = f"{name.split('/')[0]} ({name.rsplit('/', 1)[-1]})" if name.startswith("training/") else name
        if len(one.parts) < 2 or not one.workers.gpus or stage in shown:
            continue
        shown.add(stage)
        sums: dict[str, float] = {}
        for part in one.parts:
            sums[part.name] = sums.get(part.name, 0.0) + part.seconds
        parts = ", ".join(f"{what} {time_text(seconds)}" for what, seconds in sums.items() if seconds)
        lines.append(f"time of {stage}: {parts}")
    return lines


def _candidate_lines(run: Run, plan: Plan) -> list[str]:
    """All candidates one after another on the profile's group, and side by side on a group each."""
    found = plan.candidates()
    if len(found) < 2:
        return []
    stages = [one for own in found.values() for one in own]
    gpus = stages[0].workers.gpus
    if not gpus:
        return []
    hours = sum(one.device_hours or 0.0 for one in stages)
    cost = sum(plan.cost(one.work.name) or 0.0 for one in stages)
    money = f"{hours:,.0f} GPU-hours, {cost:,.0f} {plan.currency}"
    alone = time_text(sum(one.seconds or 0.0 for one in stages))
    together = time_text(max(sum(one.seconds or 0.0 for one in own) for own in found.values()))
    return [
        f"{len(found)} candidates one after another on {gpus:,.0f} GPUs: {alone}, {money}",
        f"{len(found)} candidates side by side on {gpus * len(found):,.0f} GPUs (a group of {gpus:,.0f} each): {together}, {money}",
    ]


def memory_lines(found: Sequence[Fit]) -> list[str]:
    """What one GPU holds in every stage, part by part, beside what it may."""
    known = [one for one in found if one.memory is not None]
    rows = [
        (
            one.stage,
            one.what,
            f"{one.memory.total / 1e9:,.1f}",
            f"{one.limit / 1e9:,.1f}",
            ", ".join(f"{name} {size / 1e9:.1f}" for name, size in one.memory.parts.items()),
        )
        for one in known
        if one.memory is not None
    ]
    head = ("memory of a GPU", "what it holds", "GB", "may be filled", "of it")
    lines = text_table(head, rows, {0, 1, 4}, style=None) if rows else []
    unknown = sorted({one.what for one in found if one.memory is None and one.limit})
    return [*lines, *(f"memory: {what}" for what in unknown)]


def _steps_text(one: Estimate, runs: int) -> str:
    steps = one.work.steps
    assert steps is not None  # noqa: S101 - only training has lines here
    stage = steps.stage
    total = "steps unknown" if steps.steps is None else f"{steps.steps:,} steps"
    each = f" (each of {runs} candidates)" if runs > 1 else ""
    return (
        f"{stage.name}{each}: {total} x {stage.global_batch:,} queries, {stage.negatives} negatives, "
        f"lr {stage.learning_rate:g}, on {one.workers.label}"
    )


def _cost_text(plan: Plan, one: Estimate) -> str:
    if one.seconds is None:
        return f"not predicted: {one.source}"
    unit = "GPU-hours" if one.workers.gpus else "core-hours"
    mfu = plan.mfu(one.work.name)
    at = "" if mfu is None else f" ({mfu:.1%} MFU over all of them)"
    return f"{time_text(one.seconds)}{at}, {amount_text(one.device_hours)} {unit}, {amount_text(plan.cost(one.work.name))} {plan.currency}"


def _published_line(published: Published, shown: dict[str, Estimate]) -> str:
    theirs = sum(published.stage_hours.values())
    ours = [one.seconds for one in shown.values()]
    parts = " + ".join(f"{value:.1f}" for value in published.stage_hours.values())
    known = [value for value in ours if value is not None]
    total = f"{sum(known) / 3600:.1f} h" if len(known) == len(ours) else "not predicted"
    return (
        f"training: both stages of one candidate {total} by this plan; published, and not what the plan is fitted to: {parts} = {theirs:.1f} h on {published.gpus} "
        f"{published.device}, {theirs * published.gpus:,.0f} GPU-hours ({published.source})"
    )


def _sources(plan: Plan, rates: RatesConfig) -> list[str]:
    """What each number rests on, equal ones together: first what was measured, then what others published, then assumptions."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}

    def rests(what: str, part: str, basis: str, source: str) -> None:
        parts = found.setdefault((basis, source), {}).setdefault(what, [])
        if part not in parts:
            parts.append(part)

    for name, one in plan.estimates.items():
        kind = name.split("/")[0]
        for part in one.parts:
            if part.seconds:
                rests(kind, part.name, part.basis, part.source)
        if not one.parts:
            rests(kind, "", one.basis or "not known", one.source)
    for what, number in _numbers(plan, rates).items():
        if number is not None:
            rests(what, "", number.basis, number.source)
    order = ("measured", "published", "assumed", "not known")
    lines = [
        f"{basis}: {'; '.join(_named(what, parts) for what, parts in names.items())}: {source.removeprefix(f'{basis}: ')}"
        for basis in order
        for (own, source), names in found.items()
        if own == basis
    ]
    sizes = {
        one.work.basis.strip()
        for one in plan.estimates.values()
        if one.work.basis and one.seconds is not None
    }
    return [*lines, *(f"sizes: {text}" for text in sorted(sizes) if text != "counted")]


def _numbers(plan: Plan, rates: RatesConfig) -> dict[str, Sourced | None]:
    """What is no rate, and yet decides hours, money and what fits."""
    used = next((str(one.device) for one in plan.estimates.values() if one.workers.gpus), None)
    found: dict[str, Sourced | None] = {"length of texts": rates.text_fill}
    if used is None or used not in rates.devices:
        return found
    device = rates.devices[used]
    return found | {
        "peak": device.peak_bf16_tflops,
        "memory": device.memory_gb,
        "price": device.price_per_hour,
    }


def _named(what: str, parts: list[str]) -> str:
    """``training (communication)``; what a stage's own rate says needs no brackets."""
    own = [part for part in parts if part not in ("", "starting", "computing")]
    return f"{what} ({', '.join(own)})" if own else what


def ledger_lines(ledger: RunLedger) -> list[str]:
    """Planned beside actual, with padding, waiting and MFU where a stage measured them."""
    rows: list[tuple[str, ...]] = [
        (
            "artefact",
            "planned",
            "actual",
            "off by",
            "device-hours",
            "rows",
            "tokens",
            "steps",
            "tokens/s",
            "padding",
            "waiting",
            "MFU",
        )
    ]
    planned = actual = 0.0
    for name, entry in ledger.entries.items():
        counts = entry.counts
        if entry.planned_seconds is not None:
            planned, actual = planned + entry.planned_seconds, actual + entry.seconds
        tokens = counts.get("tokens")
        speed = counts.get("tokens_per_second") or (
            tokens / entry.seconds if tokens and entry.seconds else None
        )
        rows.append(
            (
                name, time_text(entry.planned_seconds), time_text(entry.seconds),
                off_by(entry.planned_seconds, entry.seconds), amount_text(entry.seconds * entry.devices / 3600),
                count(counts.get("rows")), count(tokens), count(counts.get("steps")), count(speed),
                percent(counts.get("padding_share")), percent(counts.get("imbalance")), percent(counts.get("mfu")),
            )
        )  # fmt: skip
    lines = text_table(rows[0], rows[1:], style=None)
    if planned:
        lines.append(
            f"of what was planned: {time_text(planned)} planned, {time_text(actual)} actual, {off_by(planned, actual)}"
        )
    return lines


def count(value: object) -> str:
    """Whole number with thousands, or a dash."""
    return f"{value:,.0f}" if isinstance(value, int | float) else "-"


def scaled(value: float | None) -> str:
    """``7.75e+20``, or a dash."""
    return "-" if value is None else f"{value:.2e}"


def percent(value: object) -> str:
    """``1.2%``, or a dash."""
    return f"{value:.1%}" if isinstance(value, int | float) else "-"


def amount_text(value: float | None) -> str:
    """Hours, or money without its currency, with as many digits as matter; or a dash."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def time_text(seconds: float | None) -> str:
    """``26.9 h``, ``4.7 min`` or ``9 s``, or a dash."""
    if seconds is None:
        return "-"
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.1f} min" if seconds >= 120 else f"{seconds:,.0f} s"


def off_by(planned: float | None, actual: float) -> str:
    """How far the plan was from what happened, ``+12%``: it took longer."""
    return "-" if not planned else f"{actual / planned - 1:+.0%}"
