"""Building the merged model of a run: the one place where merging meets the scores of evaluation.

Stages never import each other, so what scores a merge is handed to the search from here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.resources import StageResources
from embedloom.config.run import RunConfig

if TYPE_CHECKING:
    from embedloom.merging.search import SearchResult

NOT_MODELS = ("encoder", "corpus")  # what the merged node reads besides the candidates


def node(config: RunConfig, trained: Sequence[str]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
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
    from embedloom.merging.stage import merge
    from embedloom.merging.trial import scored_tasks, search_merge

    merging = config.merging
    models = {name.split("/")[1]: a.place for name, a in inputs.items() if name not in NOT_MODELS}
    base = inputs["encoder"].place if "encoder" in inputs else None
    found: SearchResult | None = None
    if merging.search is not None and out.place.exists(SEARCH_FILE):
        found = cast("SearchResult", out.place.read_json(SEARCH_FILE))  # of an interrupted build
    elif merging.search is not None:
        from embedloom.evaluation.score import DevScorer

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
