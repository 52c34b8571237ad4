"""The weight of hybrid searches, tuned on the judged queries of a corpus's dev split; kept in ``lexical.json``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.config.embedding import EmbeddingConfig
from embedloom.core.schemas import content_id
from embedloom.core.storage import Place
from embedloom.core.text import folded
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.retrieval.fusion import Candidates, Ranked, tuned_weight, weighted_sum
from embedloom.retrieval.ledger import VECTORS_FOLDER
from embedloom.retrieval.lexical import LEXICAL_FACTS, best_rows, load_lexical
from embedloom.retrieval.search import Matrix, Positions, TopK, merge_top_k, pair_scores, top_k
from embedloom.retrieval.stored import shorten, stored_vectors

LEAST_QUERIES, MOST_QUERIES = 20, 500
_DEPTH = 100
_CUT = 10  # of the nDCG


@dataclass(frozen=True, slots=True)
class Judged:
    """Queries, and for each the ids of the rows that answer it: documents, or all chunks of one that was cut."""

    queries: list[str]
    answers: list[frozenset[str]]


def judged_queries(corpus: Place, split: str = "dev", most: int = MOST_QUERIES) -> Judged:
    """The retrieval queries of a corpus artefact's split, at most so many, chosen by hash; none where it has no pairs."""
    answers: dict[str, tuple[str, set[str]]] = {}
    for name in corpus.names(f"pairs/{split}", ".parquet"):
        for row in corpus.read_table(name, ["query", "document_id", "task_type"]).to_pylist():
            if row["task_type"] == "retrieval":
                found = answers.setdefault(folded(row["query"]), (row["query"], set()))
                found[1].add(row["document_id"])
    chosen = sorted(answers, key=lambda key: content_id("tuning query", key))[:most]
    named = set().union(*(answers[key][1] for key in chosen)) if chosen else set()
    chunks = _siblings(corpus, named)
    return Judged(
        [answers[key][0] for key in chosen],
        [frozenset(one for name in answers[key][1] for one in chunks.get(name, [name])) for key in chosen],
    )


def _siblings(corpus: Place, named: set[str]) -> dict[str, list[str]]:
    """Of every named chunk all chunks of its document."""
    tables = [corpus.read_table(name, ["id", "document_id"]) for name in corpus.names("chunks", ".parquet")]
    if not tables or not named:
        return {}
    chunks = pa.concat_tables(tables)
    own = chunks.filter(pc.is_in(chunks.column("id"), pa.array(sorted(named), pa.string()))).to_pylist()
    documents = pa.array(sorted({row["document_id"] for row in own}), pa.string())
    members: dict[str, list[str]] = {}
    for row in chunks.filter(pc.is_in(chunks.column("document_id"), documents)).to_pylist():
        members.setdefault(row["document_id"], []).append(row["id"])
    return {row["id"]: members[row["document_id"]] for row in own}


def tune(
    judged: Judged, out: Place, source: EmbedderSource, config: EmbeddingConfig, normalize: bool
) -> dict[str, Any]:
    """Find the weight, write it into ``lexical.json`` and return the facts; runs in a task, a file of vectors at a time.

    Args:
        judged: the queries.
        out: a vectors artefact with an index of words; local.
        source: of the model.
        config: the embedding section.
        normalize: whether the model's vectors have unit length.
    """
    facts = out.read_json(LEXICAL_FACTS)
    known, answers = _rows_of(out, judged.answers)
    if len(known) < LEAST_QUERIES:
        return facts
    texts = [judged.queries[number] for number in known]
    kinds, instructions = [config.task_type] * len(texts), [config.instruction] * len(texts)
    queries = shorten(
        source.open().embed(texts, "query", kinds, instructions)[0], config.dimensions, normalize
    )
    candidates = _candidates(out, queries, texts, -1.0 if normalize else None)

    def score(number: int, rows: Positions) -> float:
        return ndcg(rows, answers[number])

    weight, best = tuned_weight(candidates, score)
    ends = {
        name: float(
            np.mean([score(number, weighted_sum(one, end).rows) for number, one in enumerate(candidates)])
        )
        for name, end in (("dense", 1.0), ("lexical", 0.0))
    }
    told = {
        "queries": len(texts),
        f"ndcg_at_{_CUT}": round(best, 4),
        **{k: round(v, 4) for k, v in ends.items()},
    }
    facts |= {"weight": weight, "tuned_on": told}
    out.write_json(LEXICAL_FACTS, facts)
    return facts


def ndcg(rows: Positions, answers: Positions) -> float:
    """nDCG@10 of a ranking, where every answer counts alike."""
    gains = 1 / np.log2(np.arange(2, _CUT + 2))
    hits = np.isin(rows[:_CUT], answers)
    return float(gains[: len(hits)][hits].sum() / gains[: min(_CUT, len(answers))].sum())


def _rows_of(out: Place, answers: Sequence[frozenset[str]]) -> tuple[list[int], list[Positions]]:
    """Numbers of the queries that some row answers, and those rows."""
    wanted = pa.array(sorted(set().union(*answers)), pa.string())
    places: dict[str, int] = {}
    start = 0
    for name in out.names(VECTORS_FOLDER, ".parquet"):
        ids = out.read_table(name, ["id"]).column("id").cast(pa.string())
        rows = np.flatnonzero(np.asarray(pc.is_in(ids, wanted)))
        places |= dict(zip(ids.take(pa.array(rows)).to_pylist(), (start + rows).tolist(), strict=True))
        start += len(ids)
    found = [np.array(sorted(places[one] for one in own if one in places), np.int64) for own in answers]
    known = [number for number, rows in enumerate(found) if len(rows)]
    return known, [found[number] for number in known]


def _candidates(out: Place, queries: Matrix, texts: Sequence[str], floor: float | None) -> list[Candidates]:
    """What both rankings of each query nominate, with both scores."""
    names = out.names(VECTORS_FOLDER, ".parquet")
    lexical = load_lexical(out)
    assert lexical is not None  # noqa: S101 - the caller has read its facts
    best: TopK | None = None
    start = 0
    for name in names:
        vectors = stored_vectors(out.read_table(name), name)
        found = top_k(
            queries, vectors, _DEPTH, positions=np.arange(start, start + len(vectors), dtype=np.int64)
        )
        best = found if best is None else merge_top_k([best, found], _DEPTH)
        start += len(vectors)
    assert best is not None  # noqa: S101 - an artefact has at least one vector
    words = [lexical.scores(text) for text in texts]
    lists = [Ranked(*best_rows(scores, _DEPTH)) for scores in words]
    further = [np.setdiff1d(own.rows, near) for own, near in zip(lists, best.positions, strict=True)]
    numbers = np.repeat(np.arange(len(texts)), [len(rows) for rows in further])
    rows = np.concatenate([np.empty(0, np.int64), *further]).astype(np.int64)
    scores = np.empty(len(rows), np.float32)
    start = 0
    for name in names:
        vectors = stored_vectors(out.read_table(name), name)
        here = (rows >= start) & (rows < start + len(vectors))
        scores[here] = pair_scores(queries[numbers[here]], vectors[rows[here] - start])
        start += len(vectors)
    return [
        Candidates.of(
            Ranked(best.positions[number], best.scores[number]),
            lists[number],
            _scores_at(rows[numbers == number], scores[numbers == number]),
            words[number].__getitem__,
            floor,
        )
        for number in range(len(texts))
    ]


def _scores_at(rows: Positions, scores: Matrix) -> Any:
    """Looks scores up by row; rows ascend."""
    return lambda asked: scores[np.searchsorted(rows, asked)]
