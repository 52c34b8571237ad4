"""The nodes of a run's reranker: a base with a fresh head, the trained model, its scores against no reranking, the verdict."""

from embedloom.config.reranker import BASE_NODE, GATE_NODE, MODEL_NODE, RERANKER, SCORES_NODE, RerankerConfig
from embedloom.config.run import Inputs, Node, Run, RunConfig
from embedloom.config.training import WATCHING
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.contents import Contents, digest
from embedloom.encoder.registry import local_contents, local_folder, model_at, model_key, resolve_model
from embedloom.pipeline.nodes import (
    PREPARED_FOLDER,
    VERDICT_FILE,
    stage_settings,
    task_contents,
    without_paths,
)

VECTORS_FOLDER = "_evaluation_vectors"  # of the run's own evaluation: what it embedded is not embedded again
_AFTER_TRAINING = {"top", "require"}


def reranker_nodes(config: RunConfig) -> list[Node]:
    """The four nodes, each of which depends on its own part of the section."""
    section = config.reranker
    assert section is not None  # noqa: S101 - the nodes exist only with the section
    held = local_contents(section.base)
    start = (model_key(section.base, held), section.max_tokens, section.seed)
    reads: dict[str, Contents] = {} if held is None else {section.base: held}
    base = Node(BASE_NODE, RERANKER, start, (), _base, reads, (section.base,))

    training = section.training(config.training.mix)
    own = section.model_dump(mode="json", exclude={"base", "mix", *_AFTER_TRAINING, *WATCHING})
    stage, states, held_by_sources = stage_settings(training.stages[0])
    mined = ("examples",) if training.stages[0].uses_mined else ()
    content = ({**own, "sources": stage["sources"]}, training.mix, states)
    model = Node(MODEL_NODE, RERANKER, content, (*mined, BASE_NODE), _model, held_by_sources)

    tasks = task_contents(config.evaluation.tasks)
    judged = without_paths(config.evaluation.model_dump(mode="json", include={"tasks", "prompts"}), tasks)
    files = {number: digest(held) for number, held in enumerate(tasks.values())}
    scored = (judged, section.top, files)
    evaluation = Node(SCORES_NODE, RERANKER, scored, ("corpus", "merged", MODEL_NODE), _evaluation, tasks)
    gate = Node(GATE_NODE, RERANKER, (section.gate,), (SCORES_NODE, MODEL_NODE, "merged"), _gate)
    return [base, model, evaluation, gate]


def _base(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.encoder.pairs import prepare_reranker

    section = _section(run)
    with out.local_folder() as folder:
        counts = prepare_reranker(resolve_model(section.base), section.max_tokens, section.seed, folder)
    return out.commit(counts, {"base": section.base})


def _model(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.training.reranker import train_reranker

    prepared = run.place.child(PREPARED_FOLDER)
    trained = train_reranker(
        _section(run),
        run.config.training.mix,
        model_at(inputs[BASE_NODE].place),
        inputs.get("examples"),
        run.profile.stages.training,
        run.config.encoder.dtype,
        out,
        prepared,
    )
    prepared.remove()
    return trained


def _evaluation(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    from embedloom.evaluation.reranking import evaluate_reranker

    section = _section(run)
    return evaluate_reranker(
        run.config.evaluation,
        section.top,
        inputs["corpus"],
        model_at(inputs["merged"].place),
        model_at(inputs[MODEL_NODE].place),
        run.profile.stages.evaluation,
        out,
        run.config.encoder.dtype,
        run.place.child(VECTORS_FOLDER),
    )


def _gate(run: Run, inputs: Inputs, out: ArtefactWriter) -> Artefact:
    """The verdict also goes beside the reranker's weights, where the endpoint looks for it."""
    from embedloom.evaluation.gate import store_verdict
    from embedloom.evaluation.reranking import judge_reranker

    first, reranker = (local_folder(model_at(inputs[name].place)) for name in ("merged", MODEL_NODE))
    verdict = judge_reranker(_section(run).gate, inputs[SCORES_NODE].place, first, reranker)
    out.place.write_json(VERDICT_FILE, verdict)
    store_verdict(inputs[MODEL_NODE].place, verdict)
    return out.commit({"rows": len(verdict["tasks"]), "verdict": verdict["verdict"]})


def _section(run: Run) -> RerankerConfig:
    assert run.config.reranker is not None  # noqa: S101 - the nodes exist only with the section
    return run.config.reranker
