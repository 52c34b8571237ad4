"""Commands on any model, without a run config: ``embed``, ``merge-models``, ``serve``, ``deploy``, ``gate``, ``leaderboard``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from embedloom.config.base import FrozenConfig, apply_overrides, validate
from embedloom.config.cluster import ClusterConfig, PoolConfig, Profile, StageResources, load_cluster
from embedloom.config.embedding import EmbeddingConfig
from embedloom.config.evaluation import EvaluationConfig, GateConfig
from embedloom.config.merging import MergingConfig
from embedloom.config.run import Run
from embedloom.config.serving import ServingConfig
from embedloom.config.shipped import SHIPPED_CLUSTER, cluster_file
from embedloom.core.artefacts import BUILDING_FILE, MANIFEST_FILE, Artefact, ArtefactWriter, fingerprint
from embedloom.core.contents import is_trusted
from embedloom.core.model_folder import ModelFolder
from embedloom.core.progress import begun, ended, note
from embedloom.core.storage import Place, located
from embedloom.core.verdict import REFUSED, Verdict
from embedloom.encoder.registry import NodeModel, check_model_name, open_model
from embedloom.errors import ConfigError, DataError
from embedloom.pipeline.commands import execute
from embedloom.pipeline.nodes import VERDICT_FILE
from embedloom.pipeline.preflight import check_port
from embedloom.retrieval.identity import set_aside
from embedloom.retrieval.inputs import input_state
from embedloom.serving.address import Address, answers, interrupt, started
from embedloom.serving.rollout.trial import TrialRules

# ``embedloom embed INPUT --model MODEL --out FOLDER``: vectors of any texts, without a run config.


def embedding_config(given: dict[str, Any], overrides: list[str]) -> EmbeddingConfig:
    """The embedding section that the command line describes.

    Args:
        given: keys of the section by name; None where the user said nothing.
        overrides: ``key=value`` items of the section, such as ``shard_rows=512`` or ``index.neighbours=64``.

    Raises:
        ConfigError: naming the key, the value seen and what is allowed.
    """
    content = {key: value for key, value in given.items() if value is not None}
    if "index" in content:
        content["index"] = {"kind": content["index"]}
    items = [item.removeprefix("embedding.") for item in overrides]
    return validate(EmbeddingConfig, apply_overrides(content, items), "embed")


def load_machine(given: Path | None) -> ClusterConfig:
    """The cluster config of a command without a run config.

    Where only the shipped one is found, its profile ``local`` is this machine with one actor on all its cores: there is
    no recipe whose timing hangs on two of them.

    Raises:
        ConfigError: a file that was named is missing or broken.
    """
    path = cluster_file(given)
    cluster = load_cluster(path)
    if path != SHIPPED_CLUSTER:
        return cluster
    cores = os.cpu_count() or 1
    pool = PoolConfig(threads=cores)
    machine = Profile(logical_cpus=max(4, cores), stages=StageResources(embedding=pool))
    return cluster.model_copy(update={"profiles": {**cluster.profiles, "local": machine}})


def embed_texts(
    config: EmbeddingConfig, out: str, cluster: ClusterConfig, profile: str, dry_run: bool
) -> str:
    """Embed ``config.corpus`` with ``config.model`` into the folder ``out``; returns what to print.

    Finished vectors of the same input, model and settings are left as they are; an interrupted build goes on; a
    changed input embeds what is new.

    Raises:
        DataError, ConfigError: input, model or settings that cannot be used.
    """
    corpus, place = str(config.corpus), Place(out)
    check_model_name(config.model, "--model")
    states = input_state(corpus)
    machine = cluster.profile(profile)
    pool = machine.stages.embedding
    config = config.computed(pool.gpus)
    if dry_run:
        return f"would embed {corpus} with {config.model} as {config.dtype}, up to {pool.max_actors} actors x {pool.cpus:g} CPU\n{place.uri}"
    model = open_model(NodeModel.of(config.model, config.trust_remote_code))
    settings = config.model_dump(mode="json", exclude={"previous", "corpus", "model"})
    inputs = {"corpus": fingerprint(states), "model": model.id}
    wanted = fingerprint("vectors", fingerprint(settings), inputs)
    finished = Artefact.find(place, wanted)
    if finished is not None:
        note("embed", "finished, skipped")
        return place.uri
    set_aside(place, wanted, config.previous)
    writer = ArtefactWriter(place, "vectors", fingerprint(settings), inputs, profile)
    begun("embed", "continuing an interrupted build" if writer.resumed else "building")
    from embedloom.cluster.session import ray_session

    with ray_session(machine, cluster.auth):
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.retrieval.corpora import embed_artefact

        done = embed_artefact(config, corpus, model, pool, writer)
    ended("embed", done.manifest["seconds"], done.counts)
    return place.uri


# ``embedloom merge-models MODEL... --out FOLDER``: one model of any folders, without a run config.


def merging_config(given: dict[str, Any], overrides: list[str]) -> MergingConfig:
    """The merging section that the command line describes.

    Raises:
        ConfigError: naming the key, the value seen and what is allowed.
    """
    content = {key: value for key, value in given.items() if value is not None}
    items = [item.removeprefix("merging.") for item in overrides]
    config = validate(MergingConfig, apply_overrides(content, items), "merge-models")
    if config.search is not None:
        raise ConfigError(
            "merge-models: search scores merges on a run's dev tasks; use `embedloom merge CONFIG`"
        )
    return config


def merge_folders(
    config: MergingConfig,
    models: Sequence[str],
    base: str | None,
    out: str,
    cluster: Path | None,
    profile: str | None,
    dry_run: bool,
) -> str:
    """Merge ``models`` into the folder ``out``; returns what to print.

    A finished merge of the same models and settings is left as it is, an interrupted one goes on.

    Raises:
        ConfigError, DataError: models or settings that cannot be merged, or a folder ``out`` that holds other things.
    """
    from embedloom.merging.checks import model_state
    from embedloom.merging.plan import model_names, plan_merge
    from embedloom.merging.stage import merge

    places = {name: Place(path) for name, path in zip(model_names(models), models, strict=True)}
    origin = None if base is None else Place(base)
    plan = plan_merge(config, places, origin)
    size = sum(info.nbytes for info in plan.infos)
    what = f"{len(places)} models, {config.method}, {len(plan.infos)} tensors, {size / 2**20:,.0f} MiB in {len(plan.files)} files"
    if dry_run:
        return "\n".join([f"would merge {what}", *plan.remarks, out])
    inputs = {name: model_state(place) for name, place in places.items()}
    if origin is not None:
        inputs["base model"] = model_state(origin)
    place, settings = Place(out), fingerprint(config)
    if Artefact.find(place, fingerprint("model", settings, inputs)) is not None:
        note("merge", "finished, skipped")
        return out
    _check_free(place, [*models, *([] if base is None else [base])])
    writer = ArtefactWriter(place, "model", settings, inputs, profile or "none")
    begun("merge", f"{'continuing an interrupted build' if writer.resumed else 'building'}: {what}")
    if profile is None:
        done = merge(config, places, origin, writer, threads=os.cpu_count() or 1)
    else:
        machine = load_cluster(cluster_file(cluster))
        from embedloom.cluster.session import ray_session

        with ray_session(machine.profile(profile), machine.auth):
            pool = machine.profile(profile).stages.merging
            done = merge(config, places, origin, writer, pool)
    ended("merge", done.manifest["seconds"], {})
    return out


def _check_free(place: Place, sources: Sequence[str]) -> None:
    """What stands at the target is replaced, so it must be a model of ours or an unfinished one, and no source."""
    if place.is_local and any(Place(path).is_local and Place(path).local == place.local for path in sources):
        raise ConfigError(f"--out: {place.uri} is one of the models")
    if not place.files() or place.exists(BUILDING_FILE):
        return
    if not place.exists(MANIFEST_FILE) or Artefact.open(place).manifest["details"].get("made_by") != "merge":
        raise DataError(
            f"--out: {place.uri} holds files that are no merged model; name an empty or new folder"
        )


# ``embedloom serve MODEL --corpus VECTORS``: an endpoint for any model, without a run config.


def serving_config(given: dict[str, Any], overrides: list[str]) -> ServingConfig:
    """The serving section that the command line describes.

    Args:
        given: keys of the section by name; None where the user said nothing.
        overrides: ``key=value`` items of the section, such as ``max_items=64``.

    Raises:
        ConfigError: naming the key, the value seen and what is allowed.
    """
    content = {key: value for key, value in given.items() if value is not None}
    items = [item.removeprefix("serving.") for item in overrides]
    return validate(ServingConfig, apply_overrides(content, items), "serve")


def gate_rule(config: ServingConfig, model: ModelFolder) -> ServingConfig:
    """Whether this model must have passed the gate: what the user says, else only a model that a run trained.

    A foreign model named by hand has no run that could have judged it.
    """
    stated = {"require_gate", "verdict"} & config.model_fields_set
    if stated or model.is_artefact:
        return config
    note(
        "serve",
        f"{config.model} comes from no run and has not been gated; serving.require_gate=true refuses such models",
    )
    return config.model_copy(update={"require_gate": False})


def serve_model(config: ServingConfig, cluster: ClusterConfig, profile: str, dry_run: bool) -> str:
    """Serve ``config.model`` until interrupted; returns what to print.

    Raises:
        DataError, ConfigError: a model, corpus or settings that cannot be used.
        ServeError: the endpoint did not start.
    """
    check_model_name(config.model, "MODEL")
    for further, served in config.models.items():
        if served.model is not None:
            check_model_name(served.model, f"serving.models.{further}.model")
    machine = cluster.profile(profile)
    check_port(config, machine)
    name = config.served_name or Path(config.model).expanduser().absolute().name
    url = f"http://{config.host}:{config.port}{config.route_prefix.rstrip('/')}"
    if dry_run:
        corpus = f" and search {config.corpus}" if config.corpus else ""
        return f"would serve {config.model} as {name!r}{corpus} at {url}\n{url}"
    model = open_model(NodeModel.of(config.model, config.trust_remote_code))
    config = gate_rule(config, model)
    from embedloom.cluster.session import ray_session

    with ray_session(machine, cluster.auth) as own_ray:
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.serving.stage import start_endpoint

        with start_endpoint(
            config,
            model.travels,
            model.id,
            name,
            machine.serve,
            config.compute_dtype,
            own_ray,
            machine.serve_reranker,
            machine.serve_search,
        ) as endpoint:
            endpoint.wait()
    return url


# ``embedloom serve --stop NAME``: have its command stop it; where that was killed, end what it left.


_STOP_SECONDS = 60.0  # that Ray may take to end on a busy machine, beyond the grace


def stop_endpoint(name: str, cluster: ClusterConfig, profile: str, dry_run: bool) -> str:
    """Stop an endpoint that was started on this machine; returns what to print.

    Raises:
        ConfigError: there is none of that name.
        ServeError: its command does not end.
    """
    found = started(name)
    running = found.runs
    what = f"{found.name or name} at {found.url}"
    if dry_run:
        how = f"interrupt process {found.pid}" if running else "end what its killed command left"
        return f"would {how}: {what}\n{found.url}"
    machine = cluster.profile(profile)
    if running:
        interrupt(found, machine.serve.termination_grace_seconds + _STOP_SECONDS)
    ended = _end_leftovers(found, machine, cluster)
    found.path.unlink(missing_ok=True)
    left = f"; {ended} processes were left and ended" if ended else ""
    return f"stopped {what}{left}\n{found.url}"


def _end_leftovers(found: Address, machine: Profile, cluster: ClusterConfig) -> int:
    """End what a killed command left: a Ray of its own with all its processes, else its applications; returns how many processes."""
    from embedloom.cluster.session import end_session, ray_session

    if found.session:
        return end_session(Path(found.session))
    if not answers(found.ray_address):
        return 0
    with ray_session(machine.model_copy(update={"address": found.ray_address}), cluster.auth):
        from embedloom.serving.stage import remove_all

        remove_all()
    return 0


# ``embedloom deploy MODEL``: find the running endpoint, connect to its Ray, hand over.


@dataclass(frozen=True, slots=True)
class DeployCommand:
    """The command line."""

    model: str
    share: float
    shadow: bool
    stay: bool
    new_vectors: bool
    corpus: str | None
    documents: str | None
    port: int | None
    rules: TrialRules
    require_gate: bool | None
    verdict: str | None = None
    trust_remote_code: bool = False


def trial_rules(watch_seconds: float, overrides: list[str]) -> tuple[TrialRules, bool | None]:
    """The rules that the command line states, and its word about the gate.

    Raises:
        ConfigError: naming the key, the value seen and what is allowed.
    """
    content = apply_overrides({"watch_seconds": watch_seconds}, overrides)
    gate = content.pop("require_gate", None)
    if gate not in (None, True, False):
        raise ConfigError(f"--set require_gate: {gate!r}; allowed: true, false")
    return validate(TrialRules, content, "deploy"), gate


def deploy_model(
    command: DeployCommand, cluster: ClusterConfig, profile: str, dry_run: bool
) -> tuple[str, int]:
    """Deploy; returns what to print and the exit code.

    Raises:
        ConfigError, DataError: bad input; nothing was started.
        ServeError: no endpoint, or the new version did not start or is not the model it should be.
    """
    check_model_name(command.model, "MODEL")
    machine = cluster.profile(profile)
    where = os.environ.get("RAY_ADDRESS") or machine.address
    if where is None:
        from embedloom.serving.address import find

        address = find(command.port)
        where, url = address.ray_address, address.url
        machine = machine.model_copy(update={"address": where})
    else:
        url = f"the endpoint of {where}"
    how = (
        "copies of requests"
        if command.shadow or command.new_vectors
        else f"{100 * command.share:g} % of requests"
    )
    if dry_run:
        return f"would deploy {command.model} into {url}, on {how}\n{url}", 0
    from embedloom.cluster.session import ray_session

    model = open_model(NodeModel.of(command.model, command.trust_remote_code))
    with ray_session(machine, cluster.auth):
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.serving.rollout.deploy import DeployRequest, deploy

        # A model that a run trained has a gate to pass, whatever the endpoint was started with.
        own = True if model.is_artefact or command.verdict is not None else None
        request = DeployRequest(
            model, command.rules, command.corpus, command.documents, command.share, command.shadow,
            command.new_vectors, command.stay, own if command.require_gate is None else command.require_gate,
            command.verdict,
        )  # fmt: skip
        outcome = deploy(request)
    word = "promoted" if outcome.promoted else "watched only" if command.stay else "rolled back"
    return f"{word}: {outcome.reason}\n{url}", 0 if outcome.promoted or command.stay else 1


# ``embedloom gate`` and ``embedloom leaderboard`` without a run config: any model folders, tasks and pools.


EXIT_REFUSED = 1


class GateSections(FrozenConfig):
    """The two sections that a gate reads."""

    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()


@dataclass(frozen=True, slots=True)
class GateRequest:
    """What the command line asks for."""

    candidate: str
    against: str
    tasks: Sequence[str]  # paths, mteb tasks or benchmarks; empty: the run's
    split: str
    limit: int | None
    pool: str | None
    out: str
    overrides: Sequence[str]
    prompts: str | None = None  # of mteb tasks and benchmarks
    trust_remote_code: bool = False  # whether code beside the weights of either is run


def gate_sections(request: GateRequest, run: Run | None) -> GateSections:
    """The rules and tasks: the run's, if given, with what the command line says on top.

    Raises:
        ConfigError: no task, or a key that does not exist.
    """
    content: dict[str, Any] = {"evaluation": {"baselines": ["bm25"]}, "gate": {}}
    if run is not None:
        content = {
            "evaluation": run.config.evaluation.model_dump(mode="json"),
            "gate": run.config.gate.model_dump(mode="json"),
        }
        content["evaluation"]["baselines"] = ["bm25"]  # the teacher took no part in what is compared here
    if request.tasks:
        content["evaluation"]["tasks"] = [task_entry(task, request) for task in request.tasks]
    elif run is None:
        raise ConfigError(
            "--task: needed; a folder of local tasks, a BEIR folder, an mteb task or benchmark, or give --config"
        )
    if request.prompts is not None:
        content["evaluation"]["prompts"] = request.prompts
    if request.pool is not None:
        content["evaluation"]["pool"] = request.pool
    return validate(GateSections, apply_overrides(content, list(request.overrides)), "gate")


def task_entry(task: str, request: GateRequest) -> dict[str, Any]:
    """The config entry of a ``--task``."""
    path = located(task)
    if path.exists():
        kind = "beir" if (path / "corpus.jsonl").is_file() else "local"
        entry = {"name": path.stem, "kind": kind, "path": str(path), "split": request.split}
        return {**entry, "limit": request.limit} if request.limit is not None else entry
    if task.startswith((".", "/", "~")):
        raise DataError(f"--task: {task} does not exist; allowed: a path, an mteb task or an mteb benchmark")
    return {"name": task, "kind": "benchmark" if "(" in task else "mteb"}


def gate_models(
    request: GateRequest, run: Run | None, cluster: ClusterConfig, profile: str, dry_run: bool = False
) -> tuple[str, int]:
    """Evaluate two models, judge the first, store the verdict; what to print, and the exit code.

    A verdict lies beside the weights of a model that embedloom made, else in the results' folder.

    Raises:
        UserError: models, tasks, pool or rules that cannot be used.
    """
    sections = gate_sections(request, run)
    for name, where in ((request.candidate, "CANDIDATE"), (request.against, "--against")):
        check_model_name(name, where)
    if dry_run:
        tasks = ", ".join(task.name for task in sections.evaluation.tasks)
        return f"would judge {request.candidate} against {request.against} on {tasks}\n{request.out}", 0

    names, trust = (request.candidate, request.against), request.trust_remote_code
    models = [open_model(NodeModel.of(name, trust)) for name in names]
    machine = cluster.profile(profile)
    from embedloom.cluster.session import ray_session

    with ray_session(machine, cluster.auth):
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.evaluation.gate import Contender, judge, store_verdict, verdict_text
        from embedloom.evaluation.stage import score_models

        candidate, current = (
            Contender(f"{model.path.name}-{model.revision}", model.path, model.travels) for model in models
        )
        if candidate.name == current.name:
            raise DataError(
                f"gate: {request.candidate} and {request.against} hold the same model {candidate.name}"
            )
        place = Place(request.out)
        dtype = "auto" if run is None else run.config.encoder.dtype
        workers = machine.stages.evaluation
        named = {contender.name: contender.travels for contender in (candidate, current)}
        score_models(
            sections.evaluation, _corpus(run), named, None, workers, place, dtype, place.child("_vectors")
        )
        verdict = judge(sections.gate, place, (candidate, current), sections.evaluation.pool, workers, dtype)
    if trusted := [model.name for model in (candidate, current) if is_trusted(model.folder)]:
        verdict["trust_remote_code"] = trusted
    where = store_verdict(Place(str(candidate.folder)), verdict, place)
    return f"{verdict_text(verdict)}\n{where}", EXIT_REFUSED if verdict["verdict"] == REFUSED else 0


def gate_run(run: Run, dry_run: bool) -> tuple[str, int]:
    """Judge a run's own models; what to print, and the exit code."""
    planned = execute(run, "gate", dry_run)
    if dry_run:
        return planned, 0
    from embedloom.evaluation.gate import verdict_text

    place = run.place.child("gate")
    verdict = cast(Verdict, place.read_json(VERDICT_FILE))
    code = EXIT_REFUSED if verdict["verdict"] == REFUSED else 0
    return f"{verdict_text(verdict)}\n{place.uri}/{VERDICT_FILE}", code


def leaderboard(source: str, pool: str | None, top: int, partial_in_means: bool, html: Path | None) -> str:
    """Rank a run's models, an mteb results folder or a Parquet file of scores; the table, and the page if asked for.

    Args:
        source: a run folder, an evaluation artefact, a results folder or a Parquet file.
        pool: models to rank among, of the same forms.
        top: rows shown from the first on; our own models and their neighbours always are.
        partial_in_means: count scores on some of a task's subsets in the means.
        html: where to draw it.
    """
    from embedloom.evaluation.leaderboard import load_pool, rank_models, ranked_among, shown_standings
    from embedloom.report.leaderboard import leaderboard_page, leaderboard_table

    own, types = _own_scores(Path(source).expanduser())
    if own is None:
        found = load_pool(Path(source).expanduser())
        if pool is None:
            ranked = rank_models(found.scores, found.types, found.partial, partial_in_means=partial_in_means)
            names: set[str] = set()
            about = f"{len(ranked)} models, {len(found.types)} tasks"
            about += (
                f"; left out, as no model has them whole: {', '.join(found.dropped)}" if found.dropped else ""
            )
        else:
            own, types = found.scores, found.types
    if own is not None:
        pinned = None if pool is None else load_pool(Path(pool).expanduser(), types)
        ranked, tasks = ranked_among(own, types, pinned)
        names = set(own)
        about = f"{len(ranked)} models, {len(tasks)} tasks" + (
            f", pool {pinned.source} ({pinned.fingerprint})" if pinned else ""
        )
    shown = [{"own": standing.model in names, "model": standing.model, **standing.as_json()}
             for standing in shown_standings(ranked, names, top)]  # fmt: skip
    text = leaderboard_table(shown, about)
    if html is None:
        return text
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(leaderboard_page(shown, about))
    return f"{text}\n{html}"


def _own_scores(source: Path) -> tuple[dict[str, dict[str, float]] | None, dict[str, str]]:
    """Models and baselines of a run or an evaluation; (None, {}) where the source is neither."""
    for folder in (source, source / "evaluation"):
        if (folder / "scores.json").is_file():
            table = Place(str(folder)).read_json("scores.json")
            return {**table["models"], **table["baselines"]}, dict(table.get("types", {}))
    return None, {}


def _corpus(run: Run | None) -> Artefact | None:
    """The run's corpus, for ``heldout`` tasks, if it is built."""
    if run is None or not run.place.exists("corpus/manifest.json"):
        return None
    return Artefact.open(run.place.child("corpus"), "corpus")
