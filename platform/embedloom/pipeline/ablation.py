"""``embedloom ablate``: every variant with every seed. Runs share each artefact of equal fingerprint; one table compares them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedloom.config.ablation import AblationConfig
from embedloom.config.base import apply_overrides, read_yaml, validate
from embedloom.config.cluster import ClusterConfig, load_cluster
from embedloom.config.run import Node, Run, RunConfig
from embedloom.config.shipped import cluster_file, config_file
from embedloom.core.artefacts import MANIFEST_FILE, Artefact
from embedloom.core.command_output import command_output
from embedloom.core.progress import note
from embedloom.core.storage import Place
from embedloom.errors import ConfigError, DataError
from embedloom.pipeline.graph import build_nodes, fingerprints, graph
from embedloom.pipeline.preflight import preflight

# Planning an ablation: variants become runs, and runs share every artefact that has the same fingerprint.
#
# Nothing is copied or linked: a run reads an artefact where another run, or the base config's own run, has built it. So
# a half-written one can never be taken for done, for finding is opening its manifest, which is written last.


TARGET = "evaluation"
_SEED_STEP = 1000  # between the training runs of one seed: far from the next seeds
Key = tuple[str, str]  # artefact name, fingerprint


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One variant with one seed."""

    variant: str
    seed: int
    run: Run
    nodes: dict[str, Node]
    prints: dict[str, str]  # fingerprint by artefact name

    @property
    def label(self) -> str:
        """Name of the run's folder."""
        return self.run.config.run.name


def load_ablation(path: Path, overrides: Sequence[str]) -> tuple[AblationConfig, list[str]]:
    """The ablation of a file, and those of the overrides that are about the runs.

    ``--set`` reaches both: ``seeds=[1]`` is the ablation's, ``training.loss=gecko`` every run's.

    Raises:
        ConfigError: naming the file, the key, the value seen and what is allowed.
    """
    own = [item for item in overrides if item.split("=")[0].split(".")[0] in AblationConfig.model_fields]
    content = apply_overrides(read_yaml(path), own)
    return validate(AblationConfig, content, str(path)), [item for item in overrides if item not in own]


def plan_runs(
    config: AblationConfig, path: Path, cluster: ClusterConfig, profile: str, overrides: Sequence[str]
) -> list[PlannedRun]:
    """Every variant with every seed, checked, variant by variant.

    Args:
        config: the ablation.
        path: its file; the base config's path is relative to it.
        cluster: the machines.
        profile: name of the profile all runs take.
        overrides: ``--set`` items for all runs.

    Raises:
        ConfigError: a key that the run config does not know, or a value it does not allow, naming the variant.
    """
    base = path.parent / config.base
    folder = f"{_output_dir(base, overrides)}/{config.name}"
    planned = []
    for variant in config.all_variants:
        items = [f"{key}={json.dumps(value)}" for key, value in {**config.set, **variant.set}.items()]
        for seed in config.seeds:
            try:
                content = apply_overrides(read_yaml(base), items)
            except ConfigError as error:  # it speaks of --set, as which the items are applied
                raise ConfigError(f"{path}: variant {variant.name!r}: {error}") from error
            apply_overrides(
                content, list(overrides)
            )  # after the variant's own, which may replace whole lists
            _seed_runs(content, seed)
            content["run"] = {
                **content["run"],
                "name": f"{variant.name}-seed{seed}",
                "output_dir": folder,
            }
            run = Run(validate(RunConfig, content, f"{path}: variant {variant.name!r}"), cluster, profile)
            nodes = graph(run)
            planned.append(PlannedRun(variant.name, seed, run, nodes, fingerprints(nodes)))
    allowed = ["merged", "base", *(one.name for one in planned[0].run.config.training.runs)]
    if config.model not in allowed:
        raise ConfigError(f"{path}: model is {config.model!r}; allowed: {', '.join(allowed)}")
    return planned


def base_place(path: Path, config: AblationConfig, overrides: Sequence[str]) -> Place:
    """Folder of the base config's own run, whose artefacts the variants read too."""
    base = path.parent / config.base
    name = read_yaml(base).get("run", {}).get("name", "")
    return Place(f"{_output_dir(base, overrides)}/{name}")


def demand(
    nodes: Mapping[str, Sequence[str]], prints: Mapping[str, str], known: Iterable[Key], target: str = TARGET
) -> list[str]:
    """Artefacts to build for ``target``, in order; what is known is not built, nor what only it was made from.

    Args:
        nodes: inputs of each artefact, in an order in which inputs come first.
        prints: fingerprint each will have.
        known: finished artefacts.
        target: what is wanted in the end.
    """
    finished = set(known)
    wanted = {target}
    for name in reversed(list(nodes)):
        if name in wanted and (name, prints[name]) not in finished:
            wanted.update(nodes[name])
    return [name for name in nodes if name in wanted and (name, prints[name]) not in finished]


def shared_work(runs: Sequence[PlannedRun], known: Iterable[Key]) -> list[list[str]]:
    """What each run builds itself, if they are built one after another."""
    finished = set(known)
    work = []
    for planned in runs:
        own = demand(inputs_of(planned), planned.prints, finished)
        finished |= {(name, planned.prints[name]) for name in own}
        work.append(own)
    return work


def inputs_of(planned: PlannedRun) -> dict[str, tuple[str, ...]]:
    """Names of each artefact's inputs."""
    return {name: node.inputs for name, node in planned.nodes.items()}


class Shelf:
    """Finished artefacts of several run folders, by name and fingerprint."""

    def __init__(self, places: Iterable[Place], names: Iterable[str]) -> None:
        self._found: dict[Key, Artefact] = {}
        wanted = list(names)
        for place in dict.fromkeys(places):
            for name in wanted:
                if place.exists(f"{name}/{MANIFEST_FILE}"):
                    self._add(name, Artefact.open(place.child(name)))

    @property
    def keys(self) -> set[Key]:
        """What is there."""
        return set(self._found)

    def of(self, planned: PlannedRun) -> dict[str, Artefact]:
        """A run's artefacts that are there, wherever they lie."""
        keys = {name: (name, print_) for name, print_ in planned.prints.items()}
        return {name: self._found[key] for name, key in keys.items() if key in self._found}

    def clear(self, place: Place) -> None:
        """Forget what lies at a place that is about to be built anew."""
        self._found = {key: found for key, found in self._found.items() if found.place != place}

    def put(self, name: str, artefact: Artefact) -> None:
        """Take a newly built one."""
        self._add(name, artefact)

    def _add(self, name: str, artefact: Artefact) -> None:
        self._found.setdefault((name, artefact.fingerprint), artefact)


def _output_dir(base: Path, overrides: Sequence[str]) -> str:
    section = apply_overrides({"run": read_yaml(base).get("run", {})}, list(overrides))["run"]
    return str(section.get("output_dir", "runs")).rstrip("/")


def _seed_runs(content: dict[str, Any], seed: int) -> None:
    """Give every training run a seed of its own that follows from ``seed``."""
    training = content.get("training", {})
    for number, run in enumerate(training.get("runs", training.get("candidates", []))):
        run["seed"] = seed + number * _SEED_STEP


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
    from embedloom.report.leaderboard import ablation_page, ablation_table

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
