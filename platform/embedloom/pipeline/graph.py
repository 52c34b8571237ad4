"""The graph of a run: every artefact, what it is made from, how it is built, and whether the one on disk is stale."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from embedloom.config.embedding import EmbeddingConfig
from embedloom.config.run import Inputs, Node, Run, RunConfig
from embedloom.config.synthesis import ASKING
from embedloom.config.training import ROUNDING
from embedloom.core.artefacts import (
    BUILDING_FILE,
    MANIFEST_FILE,
    Artefact,
    ArtefactWriter,
    fingerprint,
    plain_values,
    recorded,
)
from embedloom.core.contents import Contents, changes, digest
from embedloom.core.progress import begun, ended, note, stage_log
from embedloom.corpus.sources import source_contents, source_settings, source_state
from embedloom.encoder.registry import (
    NodeModel,
    hub_revisions,
    local_contents,
    model_at,
    model_key,
    models_here,
    open_model,
    resolve_model,
)
from embedloom.errors import DataError
from embedloom.pipeline.nodes import (
    PREPARED_FOLDER,
    build_chains,
    build_evaluation,
    build_gate,
    build_merged,
    build_training,
    evaluation_node,
    merged_node,
    training_nodes,
)
from embedloom.pipeline.reranking import reranker_nodes
from embedloom.retrieval.identity import aside_of, set_aside
from embedloom.retrieval.inputs import embedding_node
from embedloom.synthesis.prompts_used import (
    FINAL_FOLDERS,
    other_amounts,
    section_models,
    section_reads,
    section_state,
)

if TYPE_CHECKING:
    from embedloom.retrieval.embed import Ahead


# Why a finished artefact is not what the config and its files ask for now: which setting, which file.


_MOST_FILES = 1000  # of one input that a manifest lists; of more it has one hash
_SHOWN = 3
_COMMIT_DIGITS = 12
_SHOWN_CHARACTERS = 40
_DIGEST = re.compile(r"[0-9a-f]{32}")
_ALL = "its files"


def origin_of(node: Node) -> dict[str, Any]:
    """What a manifest keeps of what decided an artefact: its settings, and what the files it read held."""
    reads = {
        name: held if len(held) <= _MOST_FILES else {_ALL: digest(held)} for name, held in node.reads.items()
    }
    return {"settings": plain_values(*node.settings), "reads": reads}


def moved_models(artefact: Artefact) -> list[str]:
    """The Hugging Face models behind an artefact that this machine's cache has at another commit now, in words.

    Commits stand beside the fingerprint, not in it: it is known before a model is fetched, they are not.
    """
    before = artefact.manifest.get("revisions", {})
    now = hub_revisions(before)
    return [
        f"{name} moved: commit {commit[:_COMMIT_DIGITS]} -> {now[name][:_COMMIT_DIGITS]}"
        for name, commit in before.items()
        if name in now and now[name] != commit
    ]


def stale_reasons(artefact: Artefact, node: Node, wanted: Mapping[str, str]) -> list[str]:
    """Why a finished artefact has to be built again, each in a few words.

    Args:
        artefact: what is there.
        node: what it should be.
        wanted: fingerprints that all artefacts should have.
    """
    reasons = moved_models(artefact)
    if artefact.manifest["config_fingerprint"] != fingerprint(*node.settings):
        reasons += _changed(artefact.manifest.get("origin"), origin_of(node))
    recorded = artefact.manifest["inputs"]
    other = [name for name in node.inputs if recorded.get(name) != wanted[name]]
    return [*reasons, *([f"made from another {', '.join(other)}"] if other else [])] or [
        "made from other inputs"
    ]


def _changed(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    if not before:
        return ["its settings or the files it reads changed; which, an earlier version did not record"]
    found = [
        *_file_changes(before["reads"], now["reads"]),
        *_setting_changes(before["settings"], now["settings"]),
    ]
    return found or ["its settings changed"]


def _file_changes(before: Mapping[str, Contents], now: Mapping[str, Contents]) -> Iterator[str]:
    """In words: ``base/model changed: model.safetensors``."""
    for name in now:
        if name in before and (files := changes(before[name], now[name])):
            more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
            yield f"{name} changed: {', '.join(files[:_SHOWN])}{more}"
    moved = [held for name, held in before.items() if name not in now]
    for name, held in now.items():
        if name not in before and held not in moved:
            yield f"reads {name} now"
    for name, held in before.items():
        if name not in now and held not in now.values():
            yield f"no longer reads {name}"


def _setting_changes(before: Any, now: Any) -> list[str]:
    """In words: ``min_characters 50 -> 20``; hashes of files are left out, their files are named."""
    found = [
        f"{'.'.join(keys)} {_shown(old)} -> {_shown(new)}"
        for keys, old, new in _differences(before, now, ())
        if not (_is_digest(old) or _is_digest(new))
    ]
    return found[:_SHOWN] + ([f"{len(found) - _SHOWN} more settings"] if len(found) > _SHOWN else [])


def _differences(before: Any, now: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({**before, **now}):
            yield from _differences(before.get(key), now.get(key), (*keys, key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            # The outermost list is only how settings are handed on.
            yield from _differences(old, new, (*keys, str(number)) if keys else ())
    else:
        yield keys, before, now


def _is_digest(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(one, str) and _DIGEST.fullmatch(one) is not None for one in values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


# The spine: every artefact of a run, what it is made from, and how it is built.
#
#     corpus ─► synthesis ─► mining (─► rescoring) ─► examples ─► training/<candidate>/<stage> ─► merged ─► evaluation ─► gate
#                  encoder (the untrained base) ─┘                                                  └─► vectors
#
# With a reranker section also reranker/base ─► reranker/model, from the same examples, and from it and the merged model
# reranker/evaluation ─► reranker/gate.
#
# A node's fingerprint follows from its config and its inputs' fingerprints alone, so what is finished, stale or
# missing is known before anything runs. Stage modules are imported when their node is built: they bring torch,
# Ray and vLLM, and ``plan`` answers without.


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
    stages, last = training_nodes(config, build_training)
    nodes += stages
    trained = list(last.values())
    merging, merged_from = merged_node(config, trained)
    default = (config.serving.default_task,) if config.serving.default_task is not None else ()
    nodes.append(Node("merged", "merge", (*merging, *default), merged_from, _merged))
    models = ("corpus", "encoder", *trained, "merged")
    judged, held = evaluation_node(config)
    opened = (config.mining.teachers[0].model,) if "teacher" in config.evaluation.baselines else ()
    nodes.append(Node("evaluation", "evaluate", judged, models, _evaluation, held, opened))
    if config.reranker is not None:
        nodes += reranker_nodes(config)
    model = config.embedding.model
    source = {"merged": "merged", "base": "encoder"} | last
    compared = tuple(source[name] for name in (config.gate.candidate, config.gate.against))
    nodes.append(Node("gate", "gate", (config.gate,), ("evaluation", *compared), _gate))
    parents = (["corpus"] if config.embedding.corpus is None else []) + (
        [source[model]] if model in source else []
    )
    state, held = embedding_node(_embedding(run), set(source))
    opened = () if model in source else (model,)
    nodes.append(Node("vectors", "embed", state, tuple(parents), _vectors, held, opened))
    return _named_as_built(run, nodes)


def _named_as_built(run: Run, nodes: list[Node]) -> dict[str, Node]:
    """The nodes by name; what is there, finished or begun, keeps its name under other settings that decide nothing of it.

    Of training these are ``ROUNDING``, which fit a step to the memory of the workers, so weights are what they were asked
    to be; of synthesis ``ASKING``. They stand in the fingerprint all the same, as in those of older artefacts.
    """
    found: dict[str, Node] = {}
    known: dict[str, str] = {}
    for node in nodes:
        inputs = {name: known[name] for name in node.inputs}
        kept = _as_built(run, node, inputs) if node.verb in ("train", "synthesize") else node
        found[node.name] = kept
        known[node.name] = fingerprint(_kind(node.name), fingerprint(*kept.settings), inputs)
    return found


def _as_built(run: Run, node: Node, inputs: Mapping[str, str]) -> Node:
    there = recorded(run.place.child(node.name))
    if there is None:
        return node
    name, settings = there
    first = node.settings[0]
    if node.verb == "train":
        first = {**first, **_of(ROUNDING, settings[0])}
    else:
        first = {**first, "section": {**first["section"], **_of(ASKING, settings[0]["section"])}}
    kept = replace(node, settings=(first, *node.settings[1:]))
    return kept if name == fingerprint(_kind(node.name), fingerprint(*kept.settings), dict(inputs)) else node


def _of(keys: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in keys if key in settings}


def _other_rounding(run: Run, node: Node) -> str:
    """In words, the ``ROUNDING`` settings that a finished training stage was made with in place of those asked for."""
    asked = run.config.training.model_dump(mode="json", include=set(ROUNDING))
    others = [
        f"{key} {node.settings[0][key]}" for key in sorted(asked) if node.settings[0][key] != asked[key]
    ]
    return f", made with {', '.join(others)}, which decide rounding only" if others else ""


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
    if name == "synthesis":
        _set_rows_aside(run, node, inputs)
    continues = _begun_for_other_amounts(run, node, inputs) if name == "synthesis" else None
    return ArtefactWriter(
        run.place.child(name),
        _kind(name),
        fingerprint(*node.settings),
        inputs,
        run.profile_name,
        origin_of(node),
        lambda: {**(revisions or {}), **hub_revisions(node.models)},
        continues,
    )


def _set_rows_aside(run: Run, node: Node, inputs: Mapping[str, str]) -> None:
    """Rename finished synthesis whose rows count for other numbers of them; the stage takes them over."""
    place = run.place.child(node.name)
    if not place.is_local or not place.exists(MANIFEST_FILE):
        return
    artefact = Artefact.open(place)
    if _counts_for(artefact, plain_values(*node.settings), inputs):
        note(node.name, "numbers of rows changed; the rows that are there count")
        place.move_to(aside_of(place))


def _counts_for(artefact: Artefact, settings: Any, inputs: Mapping[str, str]) -> bool:
    """Whether a finished artefact has the rows of these settings but for how many."""
    made = artefact.manifest.get("origin", {}).get("settings")
    same = made is not None and made != settings and other_amounts(made, settings)
    return same and artefact.manifest["inputs"] == dict(inputs) and not moved_models(artefact)


def _begun_for_other_amounts(run: Run, node: Node, inputs: Mapping[str, str]) -> str | None:
    """Fingerprint of begun synthesis whose answers count, as only numbers of rows changed; its final files are deleted."""
    place = run.place.child(node.name)
    there = None if place.exists(MANIFEST_FILE) else recorded(place)
    if there is None:
        return None
    name, settings = there
    made = fingerprint(_kind(node.name), fingerprint(*settings), dict(inputs))
    now = plain_values(*node.settings)
    if name != made or settings == now or not other_amounts(settings, now):
        return None
    for folder in FINAL_FOLDERS:  # cut to the former quotas; what they were cut from is there
        place.child(folder).remove()
    note(node.name, "numbers of rows changed; what was written counts")
    return name


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
            other = _other_rounding(run, nodes[name]) if nodes[name].verb == "train" else ""
            note(name, f"finished, skipped{other}")
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
            build_chains(training, groups, lambda stage: _build(run, nodes, stage, done))


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
    from embedloom.compute.shards import run_tasks
    from embedloom.corpus.stage import build_corpus

    model = NodeModel.of(run.config.encoder.base)
    return build_corpus(run.config.corpus, run.config.run.seed, model, out, run_tasks)


def _encoder(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.encoder.export import prepare_base

    with out.local_folder() as folder:
        counts = prepare_base(run.config.encoder, resolve_model(run.config.encoder.base), folder)
    return out.commit(counts, {"base": run.config.encoder.base})


def _synthesis(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.synthesis.stage import model_sources, round_trip_teacher, synthesize

    config = run.config.synthesis
    assert config is not None  # noqa: S101 - the node exists only with the section
    models, teacher = model_sources(config), round_trip_teacher(config, run.config.mining.teachers)
    pools, seed = run.profile.stages, run.config.run.seed
    aside = aside_of(out.place)
    previous = Artefact.open(aside) if aside.exists(MANIFEST_FILE) else None
    if previous is not None and not _counts_for(previous, out.origin["settings"], out.inputs):
        previous = None
    written = synthesize(
        config,
        seed,
        inputs["corpus"],
        pools.synthesis,
        out,
        models,
        teacher,
        pools.mining,
        ahead=_ahead(run, out),
        previous=previous,
    )
    aside.remove()
    return written


def _ahead(run: Run, out: ArtefactWriter) -> "Ahead | None":
    from embedloom.mining.stage import teacher_sources
    from embedloom.retrieval.embed import AHEAD_FOLDER, Ahead

    place = run.place.child(AHEAD_FOLDER)
    if not out.resumed:
        place.remove()
    if not run.profile.streaming:
        return None
    return Ahead(place, tuple(teacher_sources(run.config.mining)), run.profile.stages.mining)


def _mining(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.mining.stage import mine, teacher_sources
    from embedloom.retrieval.embed import AHEAD_FOLDER

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
    from embedloom.mining.stage import rescoring_source

    config, pool = run.config.mining, run.profile.stages.mining
    return rescore(config, inputs["mining"], inputs["corpus"], rescoring_source(config), pool, out)


def _examples(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.mining.stage import build_examples, judge_source

    config, pool = run.config.mining, run.profile.stages.mining
    judge, rescored = judge_source(config), inputs.get("rescoring")
    return build_examples(config, inputs["mining"], inputs["corpus"], judge, pool, out, rescored)


def _merged(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    run.place.child(PREPARED_FOLDER).remove()  # all runs are trained
    default = run.config.serving.default_task
    return build_merged(run.config, run.profile.stages, inputs, out, default)


def _evaluation(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    return build_evaluation(run.config, run.profile, run.place, inputs, out)


def _gate(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    return build_gate(run.config, run.profile, inputs, out)


def _embedding(run: Run) -> EmbeddingConfig:
    """The section with the number type that the profile's pool computes in."""
    return run.config.embedding.computed(run.profile.stages.embedding.gpus)


def _vectors(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.retrieval.corpora import embed_artefact

    config = _embedding(run)
    models = [artefact for name, artefact in inputs.items() if name != "corpus"]
    model = model_at(models[0].place) if models else NodeModel.of(config.model, config.trust_remote_code)
    corpus = inputs["corpus"].place.uri if config.corpus is None else config.corpus
    return embed_artefact(config, corpus, open_model(model), run.profile.stages.embedding, out)


# ``embedloom replay``: which artefacts of a run are stale, and why.


State = Literal["finished", "stale", "unfinished", "missing"]


@dataclass(frozen=True, slots=True)
class ArtefactState:
    """One artefact: whether it is as its config and inputs say it must be."""

    name: str
    state: State
    reason: str = ""


def states(run: Run) -> list[ArtefactState]:
    """State of every artefact, in the order they are built; reads manifests and starts nothing.

    A finished artefact is stale if its settings, which include the state of the files it read, or what it was made
    from are not what they were, or if a Hugging Face model behind it is fetched at another commit now.

    Raises:
        DataError: a corrupt manifest.
    """
    nodes = graph(run)
    wanted = fingerprints(nodes)
    return [_state(run, node, wanted) for node in nodes.values()]


def _state(run: Run, node: Node, wanted: dict[str, str]) -> ArtefactState:
    place = run.place.child(node.name)
    if not place.exists(MANIFEST_FILE):
        begun = place.exists(BUILDING_FILE)
        return ArtefactState(node.name, "unfinished" if begun else "missing")
    artefact = Artefact.open(place)
    if artefact.fingerprint == wanted[node.name] and not moved_models(artefact):
        return ArtefactState(node.name, "finished")
    return ArtefactState(node.name, "stale", "; ".join(stale_reasons(artefact, node, wanted)))


def state_lines(found: list[ArtefactState]) -> list[str]:
    """One line an artefact."""
    width = max(len(one.name) for one in found)
    lines = [
        f"{one.name.ljust(width)}  {one.state}{f': {one.reason}' if one.reason else ''}" for one in found
    ]
    left = sum(one.state != "finished" for one in found)
    return [*lines, f"{left} of {len(found)} artefacts to build"]
