"""nDCG@10 of hybrid searches beside vectors and words alone, on the five local sets, in all their languages.

    python benchmarks/quality/hybrid.py [--quick] [--json] [--data ../shared/data/tasks] [--queries 100]

Work: MiniLM's vectors (float32), the endpoint's own index of words and its fusion; each language has its own corpus where the set has one
(tldr_cmd: one of commands for all), and at most ``--queries`` queries of each split (four times as many in sets of one language).
``tuned`` takes the weight that is best on the dev split; ``hybrid`` is untuned, ``rrf`` reciprocal ranks. ``bm25`` is mteb's baseline, which is
told each language; the endpoint's finds it. ``ours`` is the mean of ``hybrid`` over the sets, ``peer`` that of the best single ranking.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pandas as pd
from mteb.models.model_implementations.bm25 import BM25Tokenizer

from embedloom.config.embedding import LexicalConfig
from embedloom.core.prompting import document_text
from embedloom.encoder.model import Encoder
from embedloom.encoder.registry import resolve_model
from embedloom.retrieval.fusion import (
    USUAL_WEIGHT,
    WEIGHTS,
    Candidates,
    Ranked,
    reciprocal_rank,
    weighted_sum,
)
from embedloom.retrieval.lexical import best_rows, index_texts
from embedloom.retrieval.tuning import ndcg

SETS = (
    "retrieval/nq_qed",
    "retrieval/xquad",
    "retrieval/debian_desc",
    "retrieval/tldr_cmd",
    "reranking/qed_sentence",
)
DEPTH = 100
SINGLE = ("dense", "bm25", "lexical")


def rankings(folder: Path, encoder: Encoder, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Of each split and language: candidates, answers, and what each way alone ranks."""
    corpus, asked, qrels = (
        pd.read_parquet(folder / f"{name}.parquet") for name in ("corpus", "queries", "qrels")
    )
    qrels = qrels[qrels["score"] > 0]
    languages = sorted(asked["lang"].unique())
    apart = len(set(languages) & set(corpus["lang"])) > 1
    most = options.queries * (4 if len(languages) == 1 else 1)
    found: dict[str, list[dict[str, Any]]] = {"dev": [], "test": []}
    shared: Any = None
    for language in ["eng"] if options.quick else languages:
        own = corpus[corpus["lang"] == language] if apart else corpus
        if apart or shared is None:
            titles = own["title"] if "title" in own else [None] * len(own)
            texts = [document_text(title, text) for title, text in zip(titles, own["text"], strict=True)]
            shared = texts, encoder.embed(texts, "document"), index_texts(texts, LexicalConfig())
        texts, vectors, words = shared
        rows = {name: row for row, name in enumerate(own["id"])}
        judged = qrels[qrels["doc_id"].isin(rows)].groupby("query_id")["doc_id"].agg(list)
        for split, parts in found.items():
            queries = asked[
                (asked["lang"] == language) & (asked["split"] == split) & asked["id"].isin(judged.index)
            ]
            queries = queries.sort_values("id")[:most]
            if len(queries):
                answers = [np.array(sorted(rows[one] for one in judged[name])) for name in queries["id"]]
                lines = queries["text"].tolist()
                part = ranked(
                    encoder.embed(lines, "query") @ vectors.T, [words.scores(line) for line in lines]
                )
                part |= {"answers": answers}
                part["bm25"] = mtebs(texts, lines, language.split("-")[0]) if split == "test" else []
                parts.append(part)
    return found


def ranked(cosines: Any, words: list[Any]) -> dict[str, Any]:
    """Both rankings of each query, their candidates, and their reciprocal ranks."""
    near = [
        Ranked(order, scores[order])
        for scores in cosines
        for order in [np.argsort(-scores, kind="stable")[:DEPTH]]
    ]
    told = [Ranked(*best_rows(scores, DEPTH)) for scores in words]
    parts = zip(near, told, cosines, words, strict=True)
    return {
        "candidates": [Candidates.of(a, b, d.__getitem__, w.__getitem__) for a, b, d, w in parts],
        "dense": [one.rows for one in near],
        "lexical": [one.rows for one in told],
        "rrf": [reciprocal_rank(pair).rows for pair in zip(near, told, strict=True)],
    }


def mtebs(texts: list[str], queries: list[str], language: str) -> list[Any]:
    """What mteb's BM25 ranks."""
    tokenizer, index = (
        BM25Tokenizer(language=language),
        bm25s.BM25(k1=1.5, b=0.75, delta=0.5, method="lucene"),
    )
    index.index(tokenizer.fit_transform(texts), show_progress=False)
    tokens = tokenizer.transform(queries)
    names = {number: word for word, number in tokens.vocab.items()}
    known = [[names[one] for one in ids if names[one] in index.vocab_dict] for ids in tokens.ids]
    return [best_rows(index.get_scores(words), 10)[0] if words else np.empty(0, np.int64) for words in known]


def mean(parts: list[dict[str, Any]], key: str, weight: float | None = None) -> float:
    """Mean over languages of the mean over queries."""
    scores = []
    for part in parts:
        found = part[key] if weight is None else [weighted_sum(one, weight).rows for one in part[key]]
        scores.append(
            np.mean([ndcg(rows, right) for rows, right in zip(found, part["answers"], strict=True)])
        )
    return float(np.mean(scores))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="English xquad alone, 30 queries a split")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tasks"))
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    if options.quick:
        options.queries = 30
    encoder = Encoder.load(resolve_model("minilm-l6"), dtype="float32")
    rows = []
    for path in ["retrieval/xquad"] if options.quick else SETS:
        found = rankings(options.data / path, encoder, options)
        tuned = max(WEIGHTS, key=lambda weight: mean(found["dev"], "candidates", weight))
        row: dict[str, Any] = {"set": path.split("/")[1], "languages": len(found["test"]), "weight": tuned}
        row |= {key: round(mean(found["test"], key), 4) for key in (*SINGLE, "rrf")}
        row["hybrid"] = round(mean(found["test"], "candidates", USUAL_WEIGHT), 4)
        row["tuned"] = round(mean(found["test"], "candidates", tuned), 4)
        rows.append(row)
    means = {
        key: round(float(np.mean([row[key] for row in rows])), 4)
        for key in (*SINGLE, "rrf", "hybrid", "tuned")
    }
    best = max(SINGLE, key=lambda key: means[key])
    result = {
        "name": "hybrid_quality", "ours": means["hybrid"], "peer": means[best], "peer_name": best,
        "ratio": round(means["hybrid"] / means[best], 3), "unit": "nDCG@10", "equal": None,
        "work": {"means": means, "rows": rows},
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
