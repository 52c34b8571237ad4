"""Planning an ablation: variants become runs, and runs share every artefact that has the same fingerprint.

Nothing is copied or linked: a run reads an artefact where another run, or the base config's own run, has built it. So
a half-written one can never be taken for done, for finding is opening its manifest, which is written last.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.cluster.config import ClusterConfig
from embedloom.config.ablation import AblationConfig
from embedloom.config.base import apply_overrides, read_yaml, validate
from embedloom.config.run import RunConfig
from embedloom.errors import ConfigError
from embedloom.pipeline import fingerprints, graph
from embedloom.run import Node, Run
from embedloom.storage import Place

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
