"""``plan`` and ``--dry-run``: what would run where, without starting anything."""

from collections.abc import Sequence

from embedloom.config.cluster import PoolConfig
from embedloom.config.reranker import MODEL_NODE, SCORES_NODE, WORKERS
from embedloom.config.run import Node, Run
from embedloom.core.tables import text_table
from embedloom.pipeline.graph import fingerprints, finished, graph, states
from embedloom.pipeline.preflight import looks_elsewhere, problems
from embedloom.planning.cost import Plan, make_plan
from embedloom.planning.ledger import build_ledger, memory_lines, prediction_lines, write_plan
from embedloom.planning.memory import fits, memory_problems
from embedloom.planning.work import LEDGER_FILE, Known, RunLedger, read_ledger, training_steps
from embedloom.synthesis.prices import describe


def plan_table(run: Run, measured: RunLedger | None = None) -> str:
    """One line an artefact: state, who works on it, how much work it is; then what it takes and costs.

    Args:
        run: the run.
        measured: a finished run whose speeds the prediction uses; None: an earlier execution of this run, if there
            was one, else the rates file.
    """
    nodes = graph(run)
    done = finished(run, nodes)
    known = Known(done, measured or own_ledger(run), fingerprints(nodes))
    rows = [("artefact", "state", "resources", "work")]
    for name, node in nodes.items():
        state = "finished" if name in done else "to build"
        work = _done_work(done[name].counts) if name in done else _planned_work(run, nodes, name, known)
        rows.append((name, state, _resources(run, WORKERS.get(name, node.verb)), work))
    lines = text_table(rows[0], rows[1:], range(4), style=None)
    head = (
        f"{run.config.run.name} on profile {run.profile_name}: {len(done)} of {len(nodes)} artefacts finished"
    )
    replaced = [f"{one.name} is built again: {one.reason}" for one in states(run) if one.state == "stale"]
    section = run.config.synthesis
    verbs = {node.verb for name, node in nodes.items() if name not in done}
    stops = (
        []
        if looks_elsewhere(run.profile)
        else [f"cannot be built yet: {one}" for one in problems(run, verbs)]
    )
    costs = [] if section is None or "synthesis" in done else describe(section, run.profile.stages.synthesis)
    left = [name for name in nodes if name not in done]
    stops += [f"cannot be built: {one}" for one in memory_problems(run, nodes, known, left)]
    held = [] if run.rates is None else memory_lines(fits(run, nodes, run.rates, known, left))
    return "\n".join([head, *lines, *replaced, *stops, *costs, *_prediction(run, nodes, known), *held])


def predicted(run: Run, nodes: dict[str, Node], known: Known) -> Plan | None:
    """What is left to build, predicted; None without a rates file."""
    return None if run.rates is None else make_plan(run, nodes, run.rates, known, known.finished)


def check_memory(run: Run, nodes: dict[str, Node], building: Sequence[str]) -> None:
    """Fail before anything starts if a stage to be built cannot fit its GPUs, or the corpus its machine.

    Raises:
        ConfigError: what it would take, what there is, and what would fit.
    """
    for problem in memory_problems(run, nodes, Known(finished(run, nodes), own_ledger(run)), building):
        raise problem


def keep_plan(run: Run, nodes: dict[str, Node]) -> None:
    """Write the prediction into the run's folder, before anything is built."""
    known = Known(finished(run, nodes), own_ledger(run), fingerprints(nodes))
    plan = predicted(run, nodes, known)
    if plan is not None:
        write_plan(run.place, plan)


def keep_ledger(run: Run, nodes: dict[str, Node]) -> RunLedger | None:
    """Write ``ledger.json``, what the finished artefacts took beside what was planned; None without a rates file."""
    if run.rates is None:
        return None
    ledger = build_ledger(run, nodes, finished(run, nodes), run.rates)
    ledger.write(run.place)
    return ledger


def own_ledger(run: Run) -> RunLedger | None:
    """The ledger of an earlier execution in the same folder."""
    return read_ledger(run.place) if run.place.exists(LEDGER_FILE) else None


def _prediction(run: Run, nodes: dict[str, Node], known: Known) -> list[str]:
    plan = predicted(run, nodes, known)
    if plan is None or run.rates is None:
        return ["no rates.yaml beside the cluster config, so time and cost are not predicted"]
    if not plan.estimates:
        return []
    return prediction_lines(run, plan, run.rates, known.measured.run if known.measured else None)


def _resources(run: Run, verb: str) -> str:
    stages = run.profile.stages
    pools = {
        "synthesize": stages.synthesis,
        "mine": stages.mining,
        "evaluate": stages.evaluation,
        "embed": stages.embedding,
        "merge": stages.merging,
    }
    if verb == "train":
        group = stages.training
        at_once = f"{group.groups} runs at once, each " if group.groups > 1 else ""
        return f"{at_once}{group.workers} workers x {group.cpus:g} CPU" + (
            f" + {group.gpus:g} GPU" if group.gpus else ""
        )
    return _pool(pools[verb]) if verb in pools else "driver"


def _pool(pool: PoolConfig) -> str:
    count = (
        f"{pool.min_actors}"
        if pool.min_actors == pool.max_actors
        else f"{pool.min_actors}..{pool.max_actors}"
    )
    gpus = f" + {pool.gpus:g} GPU" if pool.gpus else ""
    return f"{count} actors x {pool.cpus:g} CPU{gpus}"


def _done_work(counts: dict[str, object]) -> str:
    shown = [f"{counts[key]:,} {key}" for key in ("rows", "tokens") if isinstance(counts.get(key), int)]
    return ", ".join(shown)


def _planned_work(run: Run, nodes: dict[str, Node], name: str, known: Known) -> str:
    config = run.config
    if name == "synthesis" and config.synthesis is not None:
        section = config.synthesis
        models = ", ".join(f"{generator.model} x{generator.weight:g}" for generator in section.generators)
        rows = ", ".join(f"{options.key} {options.rows:,}" for options in section.families)
        return f"{rows} rows by {models}"
    if name == "mining":
        return f"teachers {', '.join(t.model for t in config.mining.teachers)}, top {config.mining.top_k}"
    if name == "rescoring" and config.mining.rescoring is not None:
        return f"{config.mining.rescoring.model}, best {config.mining.rescoring.top}"
    if name == "examples":
        return f"{config.mining.selection.method}, {config.mining.selection.negatives} negatives"
    if name.startswith("training/"):
        found = training_steps(config, nodes[name], nodes, known)
        stage = found.stage
        steps = f"{found.steps:,} steps" if found.steps else f"{stage.epochs:g} epochs"
        return f"{steps} x {stage.global_batch:,} queries, {stage.negatives} negatives, ZeRO-{config.training.zero_stage}"
    if name == MODEL_NODE and config.reranker is not None:
        own = config.reranker
        steps = f"{own.max_steps:,} steps" if own.max_steps else f"{own.epochs:g} epochs"
        return f"{steps} x {own.global_batch:,} queries, {own.negatives} negatives, {own.loss}"
    if name == SCORES_NODE and config.reranker is not None:
        return f"{len(config.evaluation.tasks)} tasks, best {config.reranker.top}"
    if name == "merged":
        search = "" if config.merging.search is None else f", {config.merging.search.kind} on dev tasks"
        return f"{len(config.training.candidates)} models, {config.merging.method}{search}"
    if name == "evaluation":
        return f"{len(config.evaluation.tasks)} tasks x {len(config.training.candidates) + 2} models"
    if name == "gate":
        return f"{config.gate.candidate} against {config.gate.against}"
    return ""
