"""Building the runs of a training section: which artefacts they are, and several at once where the machines allow."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.run import RunConfig
from embedloom.config.training import WATCHING, TrainingStage
from embedloom.contents import Contents, digest
from embedloom.judging import open_dev_tasks, task_contents, without_paths
from embedloom.run import Build, Inputs, Node, Run
from embedloom.training.sources import source_contents, source_state

PREPARED_FOLDER = "_training_data"  # tokens that runs share
_EXPORT = "trained prompts"  # what a contract says of the training; models exported otherwise are not taken for these
_NOT_CONTENT = {"runs", "stages", *WATCHING}  # the stages are nodes of their own


def training_nodes(config: RunConfig, build: Build) -> tuple[list[Node], dict[str, str]]:
    """The stages of all runs, each run's in order, and the last stage's artefact by run.

    A stage depends on what its own run makes of the section, so a change of one run leaves the others' artefacts,
    and a change of its later stages its own earlier ones.
    """
    nodes: list[Node] = []
    dev = config.training.dev
    watched = task_contents(dev.tasks) if dev is not None else {}
    dev_state = (
        None if dev is None else {number: digest(held) for number, held in enumerate(watched.values())}
    )
    judged = ("corpus",) if dev is not None and dev.needs_corpus else ()
    last: dict[str, str] = {}
    for run in config.training.runs:
        own = config.training.of_run(run)
        shared = own.model_dump(mode="json", exclude=_NOT_CONTENT)
        if dev is not None:
            shared["dev"] = without_paths(shared["dev"], watched)
        start = "encoder"
        for stage in own.stages:
            name = f"training/{run.name}/{stage.name}"
            mined = ("examples",) if stage.uses_mined else ()
            section, states, read = _stage_settings(stage)
            content = (shared, own.runs[0], section, states, dev_state, _EXPORT)
            nodes.append(Node(name, "train", content, (*mined, start, *judged), build, {**read, **watched}))
            start = name
        last[run.name] = start
    return nodes, last


def _stage_settings(stage: TrainingStage) -> tuple[dict[str, Any], dict[str, Any], dict[str, Contents]]:
    """A stage's section without where its data lie, what those hold by source, and the same file by file."""
    section, states, reads = stage.model_dump(mode="json"), dict[str, Any](), dict[str, Contents]()
    for number, source in enumerate(stage.sources):
        state, contents = source_state(source), source_contents(source)
        section["sources"][number] = state["settings"]
        states[source.name] = dict(enumerate(state["contents"]))
        reads |= contents
    return section, states, reads


def build_training(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    """Train the stage of the run that the artefact's place names."""
    from embedloom.training.stage import train_stage

    _, run_name, stage_name = out.place.uri.rsplit("/", 2)
    section = run.config.training
    config = section.of_run(next(one for one in section.runs if one.name == run_name))
    stage = next(stage for stage in config.stages if stage.name == stage_name)
    start = next(artefact for name, artefact in inputs.items() if name not in ("examples", "corpus"))
    group, dtype = run.profile.stages.training, run.config.encoder.dtype
    mined, prepared = inputs.get("examples"), run.place.child(PREPARED_FOLDER)
    dev = open_dev_tasks(run.config, inputs.get("corpus"))
    return train_stage(
        config, stage, config.runs[0], start.place.local, mined, group, dtype, out, prepared, dev
    )


def chains(names: Sequence[str]) -> list[list[str]]:
    """Artefacts of stages, gathered by run, each run's in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split("/")[1], []).append(name)
    return list(found.values())


def build_chains(names: Sequence[str], groups: int, build: Callable[[str], None]) -> None:
    """Build stages of several runs, ``groups`` runs at a time, each run's stages one after another.

    A thread a run on the driver waits for its worker group; Ray places the groups. A run that fails ends alone: what
    the others have learnt by then is worth more than the minutes saved.

    Raises:
        Exception: the first run's that failed, after all others have ended.
    """

    def one_run(stages: list[str]) -> None:
        for name in stages:
            build(name)

    runs = chains(names)
    if groups == 1 or len(runs) == 1:
        for stages in runs:
            one_run(stages)
        return
    with ThreadPoolExecutor(max_workers=min(groups, len(runs)), thread_name_prefix="run") as pool:
        started = [pool.submit(one_run, stages) for stages in runs]
    for future in started:
        future.result()
