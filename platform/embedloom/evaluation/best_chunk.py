"""Documents that are cut into chunks, ranked as documents: each by its best chunk, whatever ranks the chunks.

A judgement is of a whole document. That its first chunk alone should answer would score a model by where in a document
the answer stands; the best chunk is what a search over chunks shows (MaxP of Dai and Callan, arXiv 1905.09217).
"""

from collections.abc import Mapping
from typing import Any

from mteb.abstasks import AbsTaskRetrieval
from mteb.models import ModelMeta
from mteb.models.models_protocols import SearchProtocol
from mteb.models.search_wrappers import SearchEncoderWrapper

Ranking = dict[str, dict[str, float]]  # query id -> document id -> score


def by_best_chunk(ranking: Mapping[str, Mapping[str, float]], owners: Mapping[str, str]) -> Ranking:
    """Scores of documents: of each the highest that a chunk of it has.

    Args:
        ranking: query id -> chunk or whole document -> score.
        owners: chunk -> its document; what is not in it is a whole document.
    """
    found: Ranking = {}
    for query, scores in ranking.items():
        best: dict[str, float] = {}
        for chunk, score in scores.items():
            owner = owners.get(chunk, chunk)
            best[owner] = max(score, best.get(owner, score))
        found[query] = best
    return found


class BestChunkSearch:
    """mteb's search protocol around a model that ranks chunks."""

    def __init__(self, model: Any, owners: Mapping[str, str]) -> None:
        self._chunks: Any = model if isinstance(model, SearchProtocol) else SearchEncoderWrapper(model)
        self._owners = owners

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Of the model that ranks."""
        meta: ModelMeta = self._chunks.mteb_model_meta
        return meta

    def index(self, corpus: Any, **options: Any) -> None:
        """Hand the chunks on."""
        self._chunks.index(corpus, **options)

    def search(self, queries: Any, **options: Any) -> Ranking:
        """Rank, then let each document stand where its best chunk does."""
        return by_best_chunk(self._chunks.search(queries, **options), self._owners)


def chunked_members(owners: Mapping[str, str]) -> dict[str, Any]:
    """What a retrieval task's class needs so that it ranks documents by their best chunk."""

    def _evaluate_subset(task: AbsTaskRetrieval, model: Any, *arguments: Any, **options: Any) -> Any:
        return AbsTaskRetrieval._evaluate_subset(task, BestChunkSearch(model, owners), *arguments, **options)

    return {"_evaluate_subset": _evaluate_subset}
