"""Hybrid search as mteb sees a model: what ``/v1/search`` finds by vectors and words, on a task's corpus and queries."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.search_wrappers import SearchEncoderWrapper

from embedloom.config.embedding import LexicalConfig
from embedloom.config.serving import SearchConfig
from embedloom.core.prompting import document_text
from embedloom.retrieval.fusion import USUAL_WEIGHT, Candidates, Ranked, weighted_sum
from embedloom.retrieval.lexical import LexicalIndex, best_rows, index_texts

Ranking = dict[str, dict[str, float]]  # query id -> document id -> score
DEPTH = SearchConfig().depth


class HybridSearch:
    """mteb's search protocol around a model: its cosines and BM25, fused by the endpoint's defaults.

    Words are cut as the endpoint cuts them, in the language that most of the corpus is in, not as mteb's own BM25 does. Where a
    task names each query's candidates, these are ranked, all of them.
    """

    def __init__(self, model: Any, weight: float = USUAL_WEIGHT) -> None:
        """Wrap an encoder.

        Args:
            model: what mteb takes for an encoder, of cosine similarity.
            weight: of the cosines.
        """
        self._dense = SearchEncoderWrapper(model)
        self._weight = weight
        self._corpus: Any = None
        self._options: dict[str, Any] = {}
        self._rows: dict[str, int] = {}
        self._lexical: LexicalIndex | None = None

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Of the model."""
        meta: ModelMeta = self._dense.mteb_model_meta
        return meta

    def index(self, corpus: Any, **options: Any) -> None:
        """Take a corpus and index its words."""
        self._corpus, self._options = corpus, options
        self._rows = {str(name): row for row, name in enumerate(corpus["id"])}
        texts = [document_text(one.get("title"), one["text"]) for one in corpus]
        self._lexical = index_texts(texts, LexicalConfig())

    def search(
        self,
        queries: Any,
        *,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> Ranking:
        """Scores of the documents that either ranking nominates, or of the given candidates.

        Args:
            queries: ids and texts.
            top_k: documents wanted of each query, at most.
            top_ranked: query id -> candidates; None: the whole corpus.
            options: mteb's, handed on.
        """
        if self._lexical is None:
            raise RuntimeError("search before index")
        words = {
            str(name): self._lexical.scores(text)
            for name, text in zip(queries["id"], queries["text"], strict=True)
        }
        nominated: Mapping[str, Sequence[str]] | None = top_ranked
        if nominated is None:
            names = list(self._rows)
            near = self._cosines(queries, min(DEPTH, len(names)), None, options)
            nominated = {
                query: list(
                    dict.fromkeys([*near[query], *(names[row] for row in best_rows(scores, DEPTH)[0])])
                )
                for query, scores in words.items()
            }
        most = max(map(len, nominated.values()), default=1)
        cosines = self._cosines(queries, max(1, most), nominated, options)
        return {
            query: self._fused(cosines[query], words[query], top_k) for query in words if query in cosines
        }

    def _cosines(
        self,
        queries: Any,
        top_k: int,
        candidates: Mapping[str, Sequence[str]] | None,
        options: dict[str, Any],
    ) -> Ranking:
        self._dense.index(self._corpus, **self._options)
        found: Ranking = self._dense.search(queries, top_k=top_k, top_ranked=candidates, **options)
        return found

    def _fused(self, cosines: Mapping[str, float], words: Any, top_k: int) -> dict[str, float]:
        names = sorted(cosines, key=self._rows.__getitem__)
        rows = np.array([self._rows[name] for name in names], np.int64)
        scores = np.array([cosines[name] for name in names])
        all_of_them = Candidates.of(
            Ranked(rows, scores), Ranked(rows[:0], scores[:0]), _none, words.__getitem__
        )
        fused = weighted_sum(all_of_them, self._weight)
        by_row = dict(zip(rows.tolist(), names, strict=True))
        best = zip(fused.rows[:top_k].tolist(), fused.scores[:top_k].tolist(), strict=True)
        return {by_row[row]: score for row, score in best}


def _none(rows: Any) -> Any:
    """Scores of no rows: all have their cosine."""
    return np.empty(len(rows))
