"""An embedding model and a reranker behind it, as one model of mteb's search protocol."""

from collections.abc import Mapping
from typing import Any

from mteb.models import ModelMeta
from mteb.models.search_wrappers import SearchEncoderWrapper

from embedloom.encoder.pairs import PairEncoder
from embedloom.evaluation.retrieval_task import Ranking


def reordered(scores: Mapping[str, float], logits: Mapping[str, float]) -> dict[str, float]:
    """Scores by which those with a logit come first, in its order, and all others behind them as they were.

    >>> reordered({"a": 0.9, "b": 0.8, "c": 0.7}, {"a": -2.0, "b": 1.0})
    {'a': 1.7, 'b': 4.7, 'c': 0.7}
    """
    if not logits:
        return dict(scores)
    first = max((score for name, score in scores.items() if name not in logits), default=0.0) + 1.0
    lowest = min(logits.values())
    return {
        name: first + logits[name] - lowest if name in logits else score for name, score in scores.items()
    }


class RerankedSearch:
    """mteb's search protocol around an embedding model whose first ``top`` documents a reranker orders anew."""

    def __init__(self, model: Any, reranker: PairEncoder, top: int) -> None:
        self.model = model  # an ``EncoderModel``
        self.reranker = reranker
        self.pairs = 0  # scored so far
        self._search = SearchEncoderWrapper(model)
        self._top = top
        self._corpus: Any = None

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Of the embedding model."""
        meta: ModelMeta = self._search.mteb_model_meta
        return meta

    def index(self, corpus: Any, **options: Any) -> None:
        """Keep the documents' texts at hand."""
        self._corpus = corpus
        self._search.index(corpus, **options)

    def search(self, queries: Any, **options: Any) -> Ranking:
        """Rank by vectors, then the best of them by the reranker, query by query."""
        corpus, self._corpus = self._corpus, None
        found: Ranking = self._search.search(queries, **options)
        places = {name: place for place, name in enumerate(corpus["id"])}
        texts = dict(zip(queries["id"], queries["text"], strict=True))
        return {query: self._ordered(str(texts[query]), own, corpus, places) for query, own in found.items()}

    def _ordered(
        self, query: str, scores: Mapping[str, float], corpus: Any, places: Mapping[str, int]
    ) -> dict[str, float]:
        best = sorted(scores, key=lambda name: (-scores[name], name))[: self._top]
        if not best:
            return {}
        documents = [_text(corpus[places[name]]) for name in best]
        self.pairs += len(best)
        logits = self.reranker.score([query] * len(best), documents).tolist()
        return reordered(scores, dict(zip(best, logits, strict=True)))


def _text(document: Mapping[str, Any]) -> str:
    """Title and text, as mteb joins them for encoders."""
    return f"{document.get('title') or ''} {document['text']}".strip()
