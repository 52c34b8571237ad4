"""The nodes of a run that take more than one call to describe or build: training, merging, evaluation and gate."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from embedloom.config.cluster import Profile, StageResources
from embedloom.config.evaluation import EvaluationTask
from embedloom.config.run import Build, Inputs, Node, Run, RunConfig
from embedloom.config.training import ROUNDING, WATCHING, TrainingStage
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.contents import Contents, digest, path_contents
from embedloom.core.storage import Place, files_at
from embedloom.encoder.registry import NodeModel, local_contents, local_folder, model_at
from embedloom.errors import ConfigError
from embedloom.training.sources import source_contents, source_state

if TYPE_CHECKING:
    from embedloom.merging.search import SearchResult


# The two last artefacts of a run, ``evaluation`` and ``gate``: which models they are about, from what they follow.


VERDICT_FILE = "verdict.json"


def task_contents(tasks: Sequence[EvaluationTask], pool: str | None = None) -> dict[str, Contents]:
    """What the files hold that local tasks and the pool are read from, by the path the config names."""
    paths = [task.path for task in tasks if task.path is not None] + ([] if pool is None else [pool])
    return {path: path_contents(path) for path in paths if files_at(path)}


def without_paths(section: dict[str, Any], contents: Mapping[str, Contents]) -> dict[str, Any]:
    """An evaluation or dev section without where its files lie: what they hold decides."""
    tasks = [{**task, "path": None} if task["path"] in contents else task for task in section["tasks"]]
    found = {**section, "tasks": tasks}
    return {**found, "pool": None} if section.get("pool") in contents else found


def evaluation_node(config: RunConfig) -> tuple[tuple[Any, ...], dict[str, Contents]]:
    """What of the config decides the scores, and the contents of the files that are read for them."""
    section, teacher = config.evaluation, config.mining.teachers[0]
    tasks = task_contents(section.tasks, section.pool)
    reads = dict(tasks)
    scored, code = "teacher" in section.baselines, teacher.trust_remote_code
    if scored and (held := local_contents(teacher.model, code=code)) is not None:
        reads[teacher.model] = held
    files = {number: digest(held) for number, held in enumerate(tasks.values())}
    settings: tuple[Any, ...] = (without_paths(section.model_dump(mode="json"), tasks), teacher.model, files)
    settings += ("trust_remote_code",) if scored and code else ()
    return (*settings, digest(reads[teacher.model])) if teacher.model in reads else settings, reads


def open_dev_tasks(config: RunConfig, corpus: Artefact | None) -> Any:
    """What training is to be scored on while it goes on, checked; None without ``training.dev``.

    Raises:
        UserError: a task that cannot be scored, or that the run is judged on.
    """
    if config.training.dev is None:
        return None
    from embedloom.evaluation.dev import dev_tasks

    return dev_tasks(config.training.dev, config.evaluation.tasks, corpus)


def build_evaluation(
    config: RunConfig, profile: Profile, run: Place, inputs: dict[str, Artefact], out: ArtefactWriter
) -> Artefact:
    """Score base, candidates and merged model beside the baselines.

    Raises:
        UserError: a task, model or baseline that cannot be scored.
        StageError: some scores failed.
    """
    from embedloom.evaluation.stage import evaluate

    last = config.training.stages[-1].name
    models = {"base": model_at(inputs["encoder"].place)}
    models |= {
        c.name: model_at(inputs[f"training/{c.name}/{last}"].place) for c in config.training.candidates
    }
    models["merged"] = model_at(inputs["merged"].place)
    teacher = config.mining.teachers[0].model
    if "teacher" in config.evaluation.baselines and config.mining.teachers[0].engine == "openai":
        raise ConfigError(
            "evaluation.baselines: 'teacher' needs a model folder, the first teacher is an endpoint"
        )
    trust = config.mining.teachers[0].trust_remote_code
    baseline = (teacher, NodeModel.of(teacher, trust)) if "teacher" in config.evaluation.baselines else None
    return evaluate(
        config.evaluation,
        inputs["corpus"],
        models,
        baseline,
        profile.stages.evaluation,
        out,
        config.encoder.dtype,
        run.child("_evaluation_vectors"),
    )


def build_gate(
    config: RunConfig, profile: Profile, inputs: dict[str, Artefact], out: ArtefactWriter
) -> Artefact:
    """Judge the candidate against the current model; the verdict also goes beside the candidate's weights."""
    from embedloom.evaluation.gate import Contender, judge, store_verdict

    rules = config.gate
    candidate, current = (artefact for name, artefact in inputs.items() if name != "evaluation")
    named = [(rules.candidate, model_at(candidate.place)), (rules.against, model_at(current.place))]
    contenders = [
        Contender(name, local_folder(model), model if isinstance(model, NodeModel) else None)
        for name, model in named
    ]
    verdict = judge(
        rules,
        inputs["evaluation"].place,
        (contenders[0], contenders[1]),
        config.evaluation.pool,
        profile.stages.evaluation,
        config.encoder.dtype,
    )
    out.place.write_json(VERDICT_FILE, verdict)
    store_verdict(candidate.place, verdict)
    return out.commit({"rows": len(verdict["tasks"]), "verdict": verdict["verdict"]})


# Building the merged model of a run: the one place where merging meets the scores of evaluation.
#
# Stages never import each other, so what scores a merge is handed to the search from here.


NOT_MODELS = ("encoder", "corpus")  # what the merged node reads besides the candidates


def merged_node(config: RunConfig, trained: Sequence[str]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """What of the config the merged model depends on, and the artefacts it reads.

    Besides the candidates these are the base for task vectors, and the corpus, whose dev split may be searched on.
    """
    merging = config.merging
    base = ("encoder",) if merging.needs_base else ()
    if merging.search is None:
        return (merging,), (*trained, *base)
    return (merging, config.encoder.dtype), (*trained, *base, "corpus")


def build_merged(
    config: RunConfig,
    resources: StageResources,
    inputs: dict[str, Artefact],
    out: ArtefactWriter,
    default_task: str | None = None,
) -> Artefact:
    """Merge the candidates as the config says, searching the weights first if it asks for it.

    Args:
        config: the run.
        resources: what merging and, for a search, evaluation may take.
        inputs: the candidates' last stages by artefact name, and what else ``node`` names.
        out: writer of the model artefact.
        default_task: whose prompt is to be the merged model's default; None: by share.
    """
    from embedloom.merging.carry import SEARCH_FILE
    from embedloom.merging.search import scored_tasks, search_merge
    from embedloom.merging.stage import merge

    merging = config.merging
    models = {name.split("/")[1]: a.place for name, a in inputs.items() if name not in NOT_MODELS}
    base = inputs["encoder"].place if "encoder" in inputs else None
    found: SearchResult | None = None
    if merging.search is not None and out.place.exists(SEARCH_FILE):
        found = cast("SearchResult", out.place.read_json(SEARCH_FILE))  # of an interrupted build
    elif merging.search is not None:
        from embedloom.evaluation.dev import DevScorer

        scratch = out.place.child("_scores")
        tasks, corpus, dtype = scored_tasks(merging.search), inputs["corpus"], config.encoder.dtype
        with DevScorer(tasks, corpus, resources.evaluation, scratch, dtype) as scorer:
            found = search_merge(
                merging, models, base, scorer, out.place, resources.merging, default_task=default_task
            )
        scratch.remove()
    if found is not None:
        merging = merging.model_copy(update={"weights": tuple(found["kept"]), "search": None})
    return merge(
        merging, models, base, out, resources.merging, base_model=config.encoder.base, search=found,
        default_task=default_task,
    )  # fmt: skip


# Building the runs of a training section: which artefacts they are, and several at once where the machines allow.


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
            section, states, read = stage_settings(stage)
            content = (shared, own.runs[0], section, states, dev_state, _EXPORT)
            nodes.append(Node(name, "train", content, (*mined, start, *judged), build, {**read, **watched}))
            start = name
        last[run.name] = start
    return nodes, last


def stage_settings(stage: TrainingStage) -> tuple[dict[str, Any], dict[str, Any], dict[str, Contents]]:
    """A stage's section without where its data lie, what those hold by source, and the same file by file."""
    section, states, reads = (
        stage.model_dump(mode="json", exclude=set(ROUNDING)),
        dict[str, Any](),
        dict[str, Contents](),
    )
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
        config, stage, config.runs[0], model_at(start.place), mined, group, dtype, out, prepared, dev
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
