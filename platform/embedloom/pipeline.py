"""The spine: every artefact of a run, what it is made from, and how it is built.

    corpus ─► synthesis ─► mining (─► rescoring) ─► examples ─► training/<candidate>/<stage> ─► merged ─► evaluation ─► gate
                 encoder (the untrained base) ─┘                                                  └─► vectors

A node's fingerprint follows from its config and its inputs' fingerprints alone, so what is finished, stale or
missing is known before anything runs. Stage modules are imported when their node is built: they bring torch,
Ray and vLLM, and ``plan`` answers without.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from embedloom import merge_build, train_build
from embedloom.artefacts import MANIFEST_FILE, Artefact, ArtefactWriter, fingerprint
from embedloom.config.run import RunConfig
from embedloom.contents import Contents, digest
from embedloom.corpus.state import source_contents, source_settings, source_state
from embedloom.encoder.registry import (
    hub_revisions,
    local_contents,
    model_key,
    models_here,
    open_model,
    resolve_model,
)
from embedloom.errors import DataError
from embedloom.judging import build_evaluation, build_gate, evaluation_node
from embedloom.progress import begun, ended, note, stage_log
from embedloom.retrieval.inputs import embedding_node
from embedloom.retrieval.previous import set_aside
from embedloom.run import Inputs, Node, Run
from embedloom.staleness import moved_models, origin_of, stale_reasons
from embedloom.synthesis.prompts_used import section_models, section_reads, section_state

if TYPE_CHECKING:
    from embedloom.retrieval.ahead import Ahead


def graph(run: Run) -> dict[str, Node]:
    """All nodes in an order in which inputs come first."""
    config = run.config
    nodes = [_corpus_node(config), _encoder_node(config)]
    if config.synthesis is not None:
        written = section_state(config.synthesis, config.mining.teachers), config.run.seed
        read = section_reads(config.synthesis, config.mining.teachers)
        opened = tuple(section_models(config.synthesis, config.mining.teachers))
        nodes.append(Node("synthesis", "synthesize", written, ("corpus",), _synthesis, read, opened))
    pairs = tuple(node.name for node in nodes if node.name in ("corpus", "synthesis"))
    found = config.mining.model_dump(mode="json", exclude={"selection", "rescoring", "audit", "memory_gib"})
    opened = tuple(teacher.model for teacher in config.mining.teachers if teacher.engine != "openai")
    trusted = {teacher.model for teacher in config.mining.teachers if teacher.trust_remote_code}
    held = models_here(opened, trusted)
    nodes.append(Node("mining", "mine", (found, *_digests(held)), pairs, _mining, held, opened))
    scored: tuple[str, ...] = ("mining", "corpus")
    if config.mining.rescoring is not None:
        model = config.mining.rescoring.model
        held = models_here([model], {model} if config.mining.rescoring.trust_remote_code else ())
        state = config.mining.rescoring, digest(held[model]) if model in held else None
        nodes.append(Node("rescoring", "mine", state, scored, _rescoring, held, (model,)))
        scored = (*scored, "rescoring")
    audit = config.mining.audit
    opened = () if audit.judge is None or audit.judge.engine == "openai" else (audit.judge.model,)
    held = models_here(opened, opened if audit.judge is not None and audit.judge.trust_remote_code else ())
    rules = (config.mining.selection, audit, *_digests(held))
    nodes.append(Node("examples", "mine", rules, scored, _examples, held, opened))
    stages, last = train_build.training_nodes(config, train_build.build_training)
    nodes += stages
    trained = list(last.values())
    merging, merged_from = merge_build.node(config, trained)
    default = (config.serving.default_task,) if config.serving.default_task is not None else ()
    nodes.append(Node("merged", "merge", (*merging, *default), merged_from, _merged))
    models = ("corpus", "encoder", *trained, "merged")
    judged, held = evaluation_node(config)
    opened = (config.mining.teachers[0].model,) if "teacher" in config.evaluation.baselines else ()
    nodes.append(Node("evaluation", "evaluate", judged, models, _evaluation, held, opened))
    model = config.embedding.model
    source = {"merged": "merged", "base": "encoder"} | last
    compared = tuple(source[name] for name in (config.gate.candidate, config.gate.against))
    nodes.append(Node("gate", "gate", (config.gate,), ("evaluation", *compared), _gate))
    parents = (["corpus"] if config.embedding.corpus is None else []) + (
        [source[model]] if model in source else []
    )
    state, held = embedding_node(config.embedding, set(source))
    opened = () if model in source else (model,)
    nodes.append(Node("vectors", "embed", state, tuple(parents), _vectors, held, opened))
    return {node.name: node for node in nodes}


def _corpus_node(config: RunConfig) -> Node:
    """The corpus: its sources wherever they lie, and the tokenizer that measures its chunks."""
    base = config.encoder.base
    tokenizer = local_contents(base, tokenizer=True)
    reads = {base: tokenizer} if tokenizer is not None else {}
    for source in config.corpus.sources:
        if (held := source_contents(source)) is not None:
            reads[str(source.path)] = held
    section = config.corpus.model_dump(mode="json")
    section["sources"] = [source_settings(source) for source in config.corpus.sources]
    states = [source_state(source) for source in config.corpus.sources]
    settings = (section, config.run.seed, model_key(base, tokenizer), states)
    return Node("corpus", "corpus", settings, (), _corpus, reads, (base,))


def _encoder_node(config: RunConfig) -> Node:
    base = config.encoder.base
    held = local_contents(base)
    section = {**config.encoder.model_dump(mode="json"), "base": model_key(base, held)}
    reads = {} if held is None else {base: held}
    return Node("encoder", "encoder", (section,), (), _encoder, reads, (base,))


def _digests(reads: Mapping[str, Contents]) -> tuple[dict[str, str], ...]:
    """Nothing where nothing is read, so that older fingerprints stay valid."""
    return ({name: digest(held) for name, held in reads.items()},) if reads else ()


def writer_for(
    run: Run,
    nodes: dict[str, Node],
    name: str,
    inputs: dict[str, str],
    revisions: Mapping[str, str] | None = None,
) -> ArtefactWriter:
    """Open the writer of a node; continues an interrupted build of the same fingerprint.

    Args:
        run: the run.
        nodes: its graph.
        name: of the node.
        inputs: fingerprints of what it is made from.
        revisions: commits of the Hugging Face models that those were made with.
    """
    if name == "vectors":  # finished ones wait beside the new ones, which take over what did not change
        set_aside(run.place.child(name), fingerprints(nodes)[name], run.config.embedding.previous)
    node = nodes[name]
    return ArtefactWriter(
        run.place.child(name),
        _kind(name),
        fingerprint(*node.settings),
        inputs,
        run.profile_name,
        origin_of(node),
        lambda: {**(revisions or {}), **hub_revisions(node.models)},
    )


def fingerprints(nodes: dict[str, Node]) -> dict[str, str]:
    """Fingerprint every node will have, without building any."""
    known: dict[str, str] = {}
    for name, node in nodes.items():
        known[name] = fingerprint(
            _kind(name), fingerprint(*node.settings), {i: known[i] for i in node.inputs}
        )
    return known


def finished(run: Run, nodes: dict[str, Node]) -> Inputs:
    """The nodes whose artefact is there with the fingerprint it should have, of models that have not moved since."""
    wanted = fingerprints(nodes)
    found = {name: Artefact.find(run.place.child(name), wanted[name]) for name in nodes}
    return {
        name: artefact
        for name, artefact in found.items()
        if artefact is not None and not moved_models(artefact)
    }


def needed_by(nodes: dict[str, Node], verb: str | None) -> list[str]:
    """Names a command builds, in order: every node for the whole run, else the verb's own nodes and the two cheap
    preparations (corpus, encoder) below them."""
    if verb is None:
        return list(nodes)
    own = [name for name, node in nodes.items() if node.verb == verb]
    direct = {i for name in own for i in nodes[name].inputs}
    return [name for name in nodes if name in own or (name in ("corpus", "encoder") and name in direct)]


def missing(run: Run, nodes: dict[str, Node], verb: str | None) -> list[str]:
    """Names that a command has to build now.

    Raises:
        DataError: a single stage whose inputs other commands must build first.
    """
    done = finished(run, nodes)
    targets = needed_by(nodes, verb)
    for name in targets:
        for parent in nodes[name].inputs if name not in done else ():
            if parent not in done and parent not in targets:
                raise DataError(
                    f"{run.place.uri}/{parent}: missing or built from another config; run `embedloom {nodes[parent].verb}` first"
                )
    return [name for name in targets if name not in done]


def build_missing(run: Run, verb: str | None = None) -> list[str]:
    """Build what a command needs and is not there yet, inside a connected Ray; returns the names built."""
    nodes = graph(run)
    for artefact in finished(run, nodes).values():
        artefact.tidy()
    todo = missing(run, nodes, verb)
    for name in needed_by(nodes, verb):
        if name not in todo:
            note(name, "finished, skipped")
    build_nodes(run, nodes, todo, finished(run, nodes))
    return todo


def build_nodes(run: Run, nodes: dict[str, Node], names: list[str], done: Inputs) -> None:
    """Build artefacts in order, inside a connected Ray, from finished ones; they are added to ``done``."""
    training = [name for name in names if nodes[name].verb == "train"]
    for name in names:
        if name not in training:
            _build(run, nodes, name, done)
        elif name == training[0]:  # the first of the runs' stages starts them all
            groups = run.profile.stages.training.groups
            train_build.build_chains(training, groups, lambda stage: _build(run, nodes, stage, done))


def _build(run: Run, nodes: dict[str, Node], name: str, done: Inputs) -> None:
    """Build one node from finished ones, and add it to them."""
    node = nodes[name]
    inputs = {parent: done[parent] for parent in node.inputs}
    stale = _stale(run, nodes, name)
    made_from = {parent: artefact.fingerprint for parent, artefact in inputs.items()}
    revisions = {n: c for one in inputs.values() for n, c in one.manifest.get("revisions", {}).items()}
    writer = writer_for(run, nodes, name, made_from, revisions)
    with stage_log(run.place, name):
        if stale:
            note(name, f"what is there is replaced: {'; '.join(stale)}")
        begun(name, "continuing an interrupted build" if writer.resumed else "building")
        done[name] = node.build(run, inputs, writer)
        ended(name, done[name].manifest["seconds"], done[name].counts)


def _stale(run: Run, nodes: dict[str, Node], name: str) -> list[str]:
    """Why what stands at an artefact's place is not it; empty where nothing does."""
    place, wanted = run.place.child(name), fingerprints(nodes)
    if not place.exists(MANIFEST_FILE):
        return []
    return stale_reasons(Artefact.open(place), nodes[name], wanted)


def _kind(name: str) -> str:
    first = name.split("/")[0]
    return {"encoder": "model", "training": "model", "merged": "model"}.get(first, first)


def _corpus(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.corpus.stage import build_corpus

    return build_corpus(run.config.corpus, run.config.run.seed, resolve_model(run.config.encoder.base), out)


def _encoder(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.encoder.export import prepare_base

    with out.local_folder() as folder:
        counts = prepare_base(run.config.encoder, resolve_model(run.config.encoder.base), folder)
    return out.commit(counts, {"base": run.config.encoder.base})


def _synthesis(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.synthesis.sources import model_sources, round_trip_teacher
    from embedloom.synthesis.stage import synthesize

    config = run.config.synthesis
    assert config is not None  # noqa: S101 - the node exists only with the section
    models, teacher = model_sources(config), round_trip_teacher(config, run.config.mining.teachers)
    pools, seed = run.profile.stages, run.config.run.seed
    return synthesize(
        config,
        seed,
        inputs["corpus"],
        pools.synthesis,
        out,
        models,
        teacher,
        pools.mining,
        ahead=_ahead(run, out),
    )


def _ahead(run: Run, out: ArtefactWriter) -> "Ahead | None":
    from embedloom.mining.teachers import teacher_sources
    from embedloom.retrieval.ahead import AHEAD_FOLDER, Ahead

    place = run.place.child(AHEAD_FOLDER)
    if not out.resumed:
        place.remove()
    if not run.profile.streaming:
        return None
    return Ahead(place, tuple(teacher_sources(run.config.mining)), run.profile.stages.mining)


def _mining(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.mining.stage import mine
    from embedloom.mining.teachers import teacher_sources
    from embedloom.retrieval.ahead import AHEAD_FOLDER

    others = [artefact for name, artefact in inputs.items() if name != "corpus"]
    config = run.config.mining
    pool, ahead = run.profile.stages.mining, run.place.child(AHEAD_FOLDER)
    mined = mine(
        config,
        inputs["corpus"],
        others,
        teacher_sources(config),
        pool,
        out,
        ahead if ahead.exists() else None,
    )
    ahead.remove()
    return mined


def _rescoring(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.mining.rescore import rescore
    from embedloom.mining.teachers import rescoring_source

    config, pool = run.config.mining, run.profile.stages.mining
    return rescore(config, inputs["mining"], inputs["corpus"], rescoring_source(config), pool, out)


def _examples(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.mining.stage import build_examples
    from embedloom.mining.teachers import judge_source

    config, pool = run.config.mining, run.profile.stages.mining
    judge, rescored = judge_source(config), inputs.get("rescoring")
    return build_examples(config, inputs["mining"], inputs["corpus"], judge, pool, out, rescored)


def _merged(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    run.place.child(train_build.PREPARED_FOLDER).remove()  # all runs are trained
    default = run.config.serving.default_task
    return merge_build.build_merged(run.config, run.profile.stages, inputs, out, default)


def _evaluation(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    return build_evaluation(run.config, run.profile, run.place, inputs, out)


def _gate(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    return build_gate(run.config, run.profile, inputs, out)


def _vectors(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.retrieval.corpora import embed_artefact

    config = run.config.embedding
    models = [artefact for name, artefact in inputs.items() if name != "corpus"]
    folder = models[0].place.local if models else resolve_model(config.model, config.trust_remote_code)
    corpus = inputs["corpus"].place.uri if config.corpus is None else config.corpus
    return embed_artefact(config, corpus, open_model(folder), run.profile.stages.embedding, out)
