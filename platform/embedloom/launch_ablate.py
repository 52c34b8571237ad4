"""``embedloom ablate``: every variant with every seed, then one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedloom.ablation import (
    TARGET,
    PlannedRun,
    Shelf,
    base_place,
    demand,
    inputs_of,
    load_ablation,
    plan_runs,
    shared_work,
)
from embedloom.artefacts import Artefact
from embedloom.cluster.config import load_cluster
from embedloom.command_output import command_output
from embedloom.config.ablation import AblationConfig
from embedloom.config.shipped import cluster_file, config_file
from embedloom.errors import DataError
from embedloom.pipeline import build_nodes
from embedloom.preflight import preflight
from embedloom.progress import note
from embedloom.storage import Place

RESULT_FILE = "ablation.json"
PAGE_FILE = "report.html"


def ablate(
    ablation: str | Path,
    profile: str | None,
    cluster: Path | None,
    overrides: Sequence[str],
    dry_run: bool,
    verbose: bool = False,
) -> str:
    """Run an ablation, or plan it; a stopped one goes on with what is missing.

    Args:
        ablation: the grid file, or the name of a shipped one.
        profile: of the cluster config; None: the file's own.
        cluster: the cluster config; None: the one beside the file.
        overrides: ``key=value`` items.
        dry_run: print the plan only.
        verbose: show what libraries print.

    Returns:
        The table, and the path of ``ablation.json`` on the last line.

    Raises:
        ConfigError: naming the file, the variant, the key, the value seen and what is allowed.
    """
    path = config_file(ablation)
    config, for_runs = load_ablation(path, overrides)
    chosen = profile or config.profile
    machines = load_cluster(cluster_file(cluster, path))
    machines.profile(chosen)
    runs = plan_runs(config, path, machines, chosen, for_runs)
    folder = Place(runs[0].run.config.run.output_dir)
    names = dict.fromkeys(name for planned in runs for name in planned.nodes)
    places = [base_place(path, config, for_runs), *(planned.run.place for planned in runs)]
    shelf = Shelf(places, names)
    work = shared_work(runs, shelf.keys)
    if dry_run:
        return f"{plan_text(config, runs, work)}\n{folder.uri}"
    for planned, own in zip(runs, work, strict=True):
        preflight(planned.run, {planned.nodes[name].verb for name in own})
    if any(work):
        from embedloom.cluster.session import ray_session

        first = runs[0].run
        with command_output(folder, verbose), ray_session(first.profile, first.cluster.auth):
            for number, planned in enumerate(runs, start=1):
                note(config.name, f"run {number} of {len(runs)}: {planned.label}")
                build_run(planned, shelf)
                write_result(config, runs, shelf, folder)
    return write_result(config, runs, shelf, folder)


def build_run(planned: PlannedRun, shelf: Shelf) -> None:
    """Build what of one run is nowhere yet."""
    names = demand(inputs_of(planned), planned.prints, shelf.keys)
    done = shelf.of(planned)
    for name in names:
        shelf.clear(planned.run.place.child(name))
    build_nodes(planned.run, planned.nodes, names, done)
    for name in names:
        shelf.put(name, done[name])


def plan_text(config: AblationConfig, runs: Sequence[PlannedRun], work: Sequence[Sequence[str]]) -> str:
    """One line a run: what it builds itself; the rest it reads from the others."""
    width = max(len(planned.label) for planned in runs)
    built = sum(map(len, work))
    wanted = sum(len(demand(inputs_of(planned), planned.prints, ())) for planned in runs)
    lines = [
        f"{planned.label.ljust(width)}  {', '.join(own) or 'finished'}"
        for planned, own in zip(runs, work, strict=True)
    ]
    head = f"{config.name}: {len(config.all_variants)} variants x {len(config.seeds)} seeds"
    return "\n".join(
        [f"{head}, {built} artefacts to build of {wanted}, the others are there or shared", *lines]
    )


def write_result(config: AblationConfig, runs: Sequence[PlannedRun], shelf: Shelf, folder: Place) -> str:
    """Write ``ablation.json`` and ``report.html`` of what is finished; the table and where it lies."""
    from embedloom.report.ablation import ablation_page, ablation_table

    scores: dict[str, dict[int, float]] = {}
    for planned in runs:
        evaluation = shelf.of(planned).get(TARGET)
        if evaluation is not None:
            scores.setdefault(planned.variant, {})[planned.seed] = score_of(evaluation, config)
    result = summary(config, scores)
    folder.write_json(RESULT_FILE, result)
    folder.write_bytes(PAGE_FILE, ablation_page(result).encode())
    return f"{ablation_table(result)}\n{folder.uri}/{RESULT_FILE}"


def score_of(evaluation: Artefact, config: AblationConfig) -> float:
    """The score an ablation compares.

    Raises:
        DataError: a task or metric that the evaluation does not have.
    """
    table = evaluation.place.read_json("scores.json")
    tasks = table["models"][config.model]
    wanted = sorted(tasks) if config.task is None else [config.task]
    values = []
    for task in wanted:
        if task not in tasks:
            raise DataError(f"ablation: task is {task!r}; allowed: {', '.join(sorted(tasks))}")
        metrics = {**table["metrics"]["models"][config.model][task], "main_score": tasks[task]}
        if not isinstance(metrics.get(config.metric), int | float):
            raise DataError(
                f"ablation: metric {config.metric!r} is not among those of {task}: {sorted(metrics)}"
            )
        values.append(float(metrics[config.metric]))
    return sum(values) / len(values)


def summary(config: AblationConfig, scores: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Content of ``ablation.json``; variants in their order, differences from the first by seeds both have."""
    variants = config.all_variants
    reference = scores.get(variants[0].name, {})
    rows: list[dict[str, Any]] = []
    for variant in variants:
        own = scores.get(variant.name, {})
        common = [seed for seed in config.seeds if seed in own and seed in reference]
        gains = [own[seed] - reference[seed] for seed in common]
        rows.append(
            {
                "name": variant.name,
                "set": variant.set,
                "scores": {str(seed): own[seed] for seed in config.seeds if seed in own},
                **_spread([own[seed] for seed in config.seeds if seed in own]),
                "difference": _spread(gains) if gains and variant is not variants[0] else None,
            }
        )
    keys = ("name", "description", "base", "set", "model", "task", "metric")
    return {key: getattr(config, key) for key in keys} | {"seeds": list(config.seeds), "variants": rows}


def _spread(values: list[float]) -> dict[str, Any]:
    from embedloom.evaluation.statistics import mean_interval

    if not values:
        return {"mean": None, "interval": None}
    interval = mean_interval(values)
    return {"mean": sum(values) / len(values), "interval": None if interval is None else list(interval)}
