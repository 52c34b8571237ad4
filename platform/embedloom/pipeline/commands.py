"""What the commands share: load a run, check that it can work here, execute it, serve it."""

from pathlib import Path
from typing import cast

from embedloom.config.cluster import check_actor_gpus, load_cluster, machines
from embedloom.config.rates import RATES_FILE, RatesConfig, load_rates
from embedloom.config.reranker import GATE_NODE, MODEL_NODE, RERANKER
from embedloom.config.run import Run, load_run, open_run, write_run_file
from embedloom.config.serving import SearchMode, ServingConfig
from embedloom.config.shipped import cluster_file, config_file
from embedloom.core.artefacts import MANIFEST_FILE, Artefact
from embedloom.core.model_folder import ModelFolder
from embedloom.core.progress import note
from embedloom.core.storage import Place
from embedloom.core.verdict import INT8_FILE, Verdict
from embedloom.encoder.registry import NodeModel, check_model_name, local_folder, model_at
from embedloom.errors import ConfigError, DataError
from embedloom.pipeline.graph import build_missing, graph, missing
from embedloom.pipeline.nodes import VERDICT_FILE
from embedloom.pipeline.preflight import check_benchmark_names, check_port, looks_elsewhere, preflight


def load(config: str | Path, profile: str, cluster: Path | None, overrides: list[str]) -> Run:
    """Read run and cluster config and check the profile.

    Args:
        config: a file, or the name of a shipped run config.
        profile: of the cluster config.
        cluster: the cluster config; None: the one that ``cluster_file`` finds.
        overrides: ``section.key=value`` items.

    Raises:
        ConfigError: naming the file, the key, the value seen and what is allowed.
    """
    path = config_file(config)
    machines_file = cluster_file(cluster, path)
    run = Run(load_run(path, overrides), load_cluster(machines_file), profile, rates_beside(machines_file))
    run.cluster.profile(profile)
    _check_generators(run, path)
    return run


def reopen(folder: str, cluster: Path | None, profile: str | None) -> Run:
    """A run that was executed before, by its ``run.json``.

    Raises:
        DataError: no ``run.json`` there.
        ConfigError: a config that this version does not read, or an unknown profile.
    """
    path = cluster_file(cluster)
    return open_run(Place(folder), load_cluster(path), profile, rates_beside(path))


def rates_beside(cluster: Path) -> RatesConfig | None:
    """The rates file in the cluster config's folder; None if there is none."""
    path = cluster.parent / RATES_FILE
    return load_rates(path) if path.is_file() else None


def _check_generators(run: Run, config: Path) -> None:
    """Raise ConfigError if an engine of a generator's own pool does not fit a node of the profile."""
    generators = () if run.config.synthesis is None else run.config.synthesis.generators
    for index, generator in enumerate(generators):
        if generator.pool is not None:
            try:
                check_actor_gpus(generator.pool, machines(run.profile), f"synthesis.generators.{index}.pool")
            except ValueError as error:
                raise ConfigError(f"{config}: {error}") from error


def execute(run: Run, verb: str | None, dry_run: bool) -> str:
    """Run a verb (None: everything) and return the artefact's path; a dry run only prints the plan."""
    from embedloom.pipeline.plan import check_memory, keep_ledger, keep_plan, plan_table

    nodes = graph(run)
    if verb is not None and all(node.verb != verb for node in nodes.values()):
        raise ConfigError(f"{verb}: this run has no such stage (no section {verb!r} in its config)")
    todo = missing(run, nodes, verb)
    verbs = {nodes[name].verb for name in todo}
    if not dry_run or not looks_elsewhere(run.profile):
        preflight(run, verbs)
    if dry_run:
        return f"{plan_table(run)}\n{run.place.uri}"
    check_memory(run, nodes, todo)
    check_benchmark_names(run, verbs)
    write_run_file(run)
    if todo:
        from embedloom.cluster.session import ray_session

        keep_plan(run, nodes)  # beside the config: what is predicted before anything is built
        with ray_session(run.profile, run.cluster.auth):
            build_missing(run, verb)
        keep_ledger(run, nodes)
    else:
        build_missing(run, verb)
    if verb in (None, "evaluate", "gate"):
        from embedloom.report.page import write_report
        from embedloom.report.summary import summary_table

        report = write_report(run.place)
        summary = run.place.read_json("summary.json")
        return f"{summary_table(summary)}\n{report if verb is None else run.place.child('evaluation').uri}"
    own = [name for name, node in nodes.items() if node.verb == verb]
    folder = own[0] if len(own) == 1 else own[0].split("/")[0]
    lines: list[str] = []
    if verb == RERANKER:
        from embedloom.evaluation.gate import verdict_text

        folder = MODEL_NODE
        lines = [verdict_text(cast(Verdict, run.place.child(GATE_NODE).read_json(VERDICT_FILE)))]
    if verb == "synthesize":
        from embedloom.report.synthesis import synthesis_lines

        lines = synthesis_lines(Artefact.open(run.place.child(folder)).manifest["details"])
    return "\n".join([*lines, run.place.child(folder).uri])


def served_model(run: Run) -> tuple[Path | NodeModel, str]:
    """The model that the config serves, by its folder or what every node opens it by, and its fingerprint.

    Raises:
        DataError: it has not been built yet.
    """
    return _model_of(run, run.config.serving.model, "serving.model")


def served_config(run: Run) -> ServingConfig:
    """The serving section with the further models by what every node opens them by.

    Raises:
        DataError: one has not been built yet, or is not there.
    """
    models = {}
    for name, served in run.config.serving.models.items():
        if served.model is not None:
            found, _ = _model_of(run, served.model, f"serving.models.{name}.model")
            opened = found.name if isinstance(found, NodeModel) else str(found)
            served = served.model_copy(update={"model": opened})
        models[name] = served
    return run.config.serving.model_copy(update={"models": models})


def _model_of(run: Run, name: str, where: str) -> tuple[Path | NodeModel, str]:
    """A model by the name that a config has for it, and its fingerprint."""
    config = run.config
    last = config.training.stages[-1].name
    folders = {"merged": "merged", "base": "encoder"} | {
        c.name: f"training/{c.name}/{last}" for c in config.training.candidates
    }
    if name in folders:
        artefact = Artefact.open(run.place.child(folders[name]), "model")
        return model_at(artefact.place), artefact.fingerprint
    check_model_name(name, where)
    if "://" in name:
        return NodeModel.of(name, config.serving.trust_remote_code), name
    folder = Path(name)
    if config.serving.trust_remote_code:
        from embedloom.encoder.own_code import trusted_copy

        folder = trusted_copy(folder.expanduser().absolute())
    return folder, name


def with_reranker(run: Run, serving: ServingConfig) -> ServingConfig:
    """A section ``serving`` of a run with the run's own reranker, where it has one and none is stated.

    One that was not built or did not pass its gate is not served, and a line says so: the endpoint is no worse without.
    """
    if serving.reranker is not None or run.config.reranker is None:
        return serving
    place = run.place.child(MODEL_NODE)
    if not place.exists(MANIFEST_FILE):
        note("serve", f"{place.uri} is not built; /v1/rerank is answered by similarity")
        return serving
    opened = model_at(place)
    if serving.require_gate:
        try:
            ModelFolder(local_folder(opened)).check_gated()
        except DataError as error:
            note("serve", f"the reranker is not served, /v1/rerank is answered by similarity: {error}")
            return serving
    name = opened.name if isinstance(opened, NodeModel) else str(opened)
    return serving.model_copy(update={"reranker": name})


def serve_run(
    run: Run,
    questions: list[str],
    dry_run: bool,
    task: str | None = None,
    mode: SearchMode | None = None,
) -> str:
    """Serve the run's model until interrupted, or just long enough to answer ``questions``.

    Args:
        run: the run.
        questions: none: until interrupted.
        dry_run: say what would be served.
        task: what the questions are asked as; None: the model's default.
        mode: how the corpus is searched for them, at ``/v1/search``; None: by the vectors of the run's own documents.

    Raises:
        ConfigError: settings that cannot be served, or a mode that the vectors have no index for.
    """
    model, model_id = served_model(run)
    config = with_reranker(run, served_config(run))
    if mode is not None:
        searched = config.search.model_copy(update={"mode": mode})
        own = config.corpus or run.place.child("vectors").uri
        config = config.model_copy(update={"corpus": own, "search": searched})
    place = model.name if isinstance(model, NodeModel) else str(model)
    url = f"http://{run.config.serving.host}:{run.config.serving.port}/v1"
    check_port(run.config.serving, run.profile)
    if dry_run:
        beside = "" if config.reranker is None else f", with the reranker {config.reranker},"
        return f"would serve {place} ({model_id}){beside} at {url}\n{place}"
    from embedloom.cluster.session import ray_session

    if run.config.serving.compute_dtype == "int8" and run.config.serving.require_gate:
        _judge_int8(run, model)
    with ray_session(run.profile, run.cluster.auth) as own_ray:
        # Imports Ray, which reads how to authenticate on its first import: the session has said it by now.
        from embedloom.serving.stage import start_endpoint

        endpoint = start_endpoint(
            config, model, model_id, run.config.serving.served_name or run.config.run.name,
            run.profile.serve, run.config.serving.compute_dtype, own_ray, run.profile.serve_reranker,
            run.profile.serve_search,
        )  # fmt: skip
        try:
            if not questions:
                endpoint.wait()
                return url
            return f"{_answers(run, url, questions, task, mode)}\n{url}"
        finally:
            endpoint.stop()


def _judge_int8(run: Run, model: Path | NodeModel) -> None:
    """Have ``int8.json`` beside the weights, measured on the run's held-out queries; ``check_int8`` decides by it."""
    # Into a foreign model's folder nothing is written; `check_int8` says how to go on.
    folder = ModelFolder(local_folder(model))
    if not folder.keeps_verdict or folder.int8_verdict is not None:
        return
    from embedloom.evaluation.dev import measure_int8

    note("serve", "compute_dtype int8: measuring what it costs on the held-out queries")
    corpus = Artefact.open(run.place.child("corpus"), "corpus")
    verdict = measure_int8(folder.path, corpus, run.profile.serve.compute_threads)
    Place(model.name if isinstance(model, NodeModel) else str(model)).write_json(INT8_FILE, verdict)
    note("serve", f"compute_dtype int8 loses {verdict['lost']:.4f} nDCG@10 on {verdict['queries']} queries")


def _answers(run: Run, url: str, questions: list[str], task: str | None, mode: SearchMode | None) -> str:
    from embedloom.serving.stage import nearest_documents, searched_documents

    if mode is not None:
        return "\n\n".join(searched_documents(url, question, mode, task=task) for question in questions)
    corpus = Artefact.open(run.place.child("corpus"), "corpus")
    vectors = Artefact.open(run.place.child("vectors"), "vectors")
    name = run.config.serving.served_name or run.config.run.name
    return "\n\n".join(
        nearest_documents(url, name, question, corpus, vectors, task=task) for question in questions
    )
