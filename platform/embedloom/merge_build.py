"""Building the merged model of a run: the one place where merging meets the scores of evaluation.

Stages never import each other, so what scores a merge is handed to the search from here.
"""

from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.resources import StageResources
from embedloom.config.run import RunConfig

NOT_MODELS = ("encoder", "corpus")  # what the merged node reads besides the candidates


def settings(config: RunConfig) -> tuple[Any, ...]:
    """What of the config the merged model depends on: with a search also the type that scores are computed in."""
    return (config.merging,) if config.merging.search is None else (config.merging, config.encoder.dtype)


def others(config: RunConfig) -> tuple[str, ...]:
    """What the merged node reads besides the candidates: the base for task vectors, the corpus for a search."""
    return (("encoder",) if config.merging.needs_base else ()) + (
        ("corpus",) if config.merging.search is not None else ()
    )


def build_merged(
    config: RunConfig, resources: StageResources, inputs: dict[str, Artefact], out: ArtefactWriter
) -> Artefact:
    """Merge the candidates as the config says, searching the weights first if it asks for it.

    Args:
        config: the run.
        resources: what merging and, for a search, evaluation may take.
        inputs: the candidates' last stages by artefact name, and what ``others`` names.
        out: writer of the model artefact.
    """
    from embedloom.merging.stage import merge
    from embedloom.merging.trial import TRIALS_FOLDER, scored_tasks, search_merge

    merging = config.merging
    models = {name.split("/")[1]: a.place for name, a in inputs.items() if name not in NOT_MODELS}
    base = inputs["encoder"].place if "encoder" in inputs else None
    found = None
    if merging.search is not None:
        from embedloom.evaluation.score import DevScorer

        scratch = out.place.child(f"{TRIALS_FOLDER}/scores")
        tasks, corpus, dtype = scored_tasks(merging.search), inputs["corpus"], config.encoder.dtype
        with DevScorer(tasks, corpus, resources.evaluation, scratch, dtype) as scorer:
            found = search_merge(merging, models, base, scorer, out.place, resources.merging)
        merging = merging.model_copy(update={"weights": tuple(found["kept"]), "search": None})
    done = merge(merging, models, base, out, resources.merging, base_model=config.encoder.base, search=found)
    out.place.child(TRIALS_FOLDER).remove()
    return done
