"""Latency of lexical and hybrid searches beside dense ones, at one endpoint; lexical scores beside bm25s itself.

    python benchmarks/hybrid_search.py [--quick] [--json] [--documents 50000] [--queries 400] [--clients 1 4] [--data FOLDER]

Work: ``embedloom serve minilm-l6`` with a corpus of package descriptions (``../shared/data``; without it, docstrings of the
standard library, repeated with numbers), exact search, texts left out of the answers. Vectors are drawn at random, as what they hold does
not change what a search costs; words are the texts' own. Clients ask for the descriptions' titles, each query in every mode
before the next one, in an order that turns, so that whatever else runs on the machine meets all modes alike. ``cpu`` has what a search costs in
CPU time of one process, which company on the machine hardly moves; there, words are looked up before the query is embedded, not
meanwhile. ``ours`` is
p99 of hybrid searches in milliseconds with the most clients, ``peer`` that of dense ones; ``ratio`` below 1 is slower than dense.
``equal``: the first lexical hits and their scores are those of bm25s, of the same words.
"""

import argparse
import concurrent.futures
import inspect
import json
import os
import pkgutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from serving import servers

MODES = ("dense", "hybrid", "lexical")
CORPUS = "train/corpora/debian_packages_eng.parquet"
_CHECKED = 20  # queries whose lexical hits are compared with bm25s's


def texts_of(data: Path, documents: int) -> tuple[list[str], list[str]]:
    """Titles and texts."""
    path = data / CORPUS
    if path.is_file():
        table = pq.read_table(path, columns=["title", "text"])
        titles, texts = (table.column(name).to_pylist() for name in ("title", "text"))
    else:
        titles, texts = _docstrings()
    times = -(-documents // len(texts))
    numbered = [text if n == 0 else f"{text} {n}" for n in range(times) for text in texts]
    return (titles * times)[:documents], numbered[:documents]


def _docstrings() -> tuple[list[str], list[str]]:
    found: dict[str, str] = {}
    for module in map(
        pkgutil.resolve_name, ("argparse", "asyncio", "inspect", "random", "shutil", "statistics")
    ):
        for name, member in sorted(vars(module).items()):
            head, _, rest = (inspect.getdoc(member) or "").partition("\n")
            if callable(member) and len(rest.strip()) > 40:
                found[f"{name}: {head}"] = rest.strip()
    return list(found), list(found.values())


def make_corpus(folder: Path, model: Any, titles: list[str], texts: list[str]) -> Path:
    """A vectors artefact with an index of words, of random vectors."""
    from embedloom.compute.shards import run_here
    from embedloom.config.cluster import PoolConfig
    from embedloom.config.embedding import EmbeddingConfig, LexicalConfig
    from embedloom.core.artefacts import ArtefactWriter
    from embedloom.core.storage import Place
    from embedloom.retrieval.embed import vector_table
    from embedloom.retrieval.inputs import open_input
    from embedloom.retrieval.ledger import open_ledger
    from embedloom.retrieval.lexical import build_lexical

    ids = [f"d{number:07d}" for number in range(len(texts))]
    Place(str(folder)).write_table("in.parquet", pa.table({"id": ids, "title": titles, "text": texts}))
    place, config = Place(str(folder / "vectors")), EmbeddingConfig()
    writer = ArtefactWriter(place, "vectors", "benchmark", {"corpus": "benchmark"}, "local")
    source = open_input(str(folder / "in.parquet"), config, place)
    ledger = open_ledger(source, place, 2048, None)
    drawn, start, contract = np.random.default_rng(0), 0, model.contract.hash
    for part, rows in zip(ledger.parts, ledger.rows, strict=True):
        vectors = drawn.standard_normal((rows, 384)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        table = vector_table(ids[start : start + rows], vectors, contract, model.id, 1)
        place.write_table(f"vectors/{part}", table)
        start += rows
    build_lexical(
        "embed", LexicalConfig(), source, ledger.parts, ledger.rows, place, PoolConfig(), tasks=run_here
    )
    recipe = {"side": "document", "dimensions": None}
    writer.commit({"rows": len(ids)}, {"contract_hash": contract, "model_id": model.id, "recipe": recipe})
    return place.local


def timed(url: str, queries: list[str], clients: int) -> dict[str, list[float]]:
    """Milliseconds of every search, by mode."""

    def client(number: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {mode: [] for mode in MODES}
        with httpx.Client(trust_env=False, timeout=60) as connection:
            for turn, query in enumerate(queries[number::clients]):
                for place in range(len(MODES)):
                    mode = MODES[(place + turn) % len(MODES)]
                    body = {"query": query, "mode": mode, "top_k": 10, "return_documents": False}
                    started = time.perf_counter()
                    reply = connection.post(f"{url}/search", json=body)
                    found[mode].append((time.perf_counter() - started) * 1000)
                    if reply.status_code != 200 or reply.json()["mode"] != mode:
                        raise SystemExit(f"{mode}: {reply.status_code} {reply.text[:200]}")
        return found

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(client, range(clients)))
    return {mode: [one for part in parts for one in part[mode]] for mode in MODES}


def cpu_milliseconds(corpus: Path, model: Any, queries: list[str]) -> dict[str, Any]:
    """CPU time of the parts of a search in this process, without HTTP, and of dense and hybrid searches as a whole."""
    from embedloom.core.storage import Place
    from embedloom.encoder.model import Encoder
    from embedloom.serving.corpus import load_corpus

    encoder = Encoder.load(model.path, threads=1, dtype="float32")
    loaded = load_corpus(Place(str(corpus)), None, model.contract.hash, model.id, normalize=True)
    spent: dict[str, list[float]] = {"embed": [], "search_dense": [], "match_words": [], "search_hybrid": []}
    for query in queries:
        marks = [time.process_time()]
        vector = encoder.embed([query], "query")[0]
        marks.append(time.process_time())
        loaded.search(vector, 10, False)
        marks.append(time.process_time())
        words = loaded.match_words(query)
        marks.append(time.process_time())
        loaded.search(vector, 10, False, words)
        marks.append(time.process_time())
        for name, seconds in zip(spent, np.diff(marks), strict=True):
            spent[name].append(1000 * float(seconds))
    parts = {name: np.array(found) for name, found in spent.items()}
    whole = {
        "dense": parts["embed"] + parts["search_dense"],
        "hybrid": parts["embed"] + parts["match_words"] + parts["search_hybrid"],
    }
    told = {
        name: {"p50": round(float(np.median(found)), 2), "p99": round(float(np.quantile(found, 0.99)), 2)}
        for name, found in {**parts, **whole}.items()
    }
    return {**told, "hybrid_over_dense_p99": round(told["hybrid"]["p99"] / told["dense"]["p99"], 3)}


def row_of(clients: int, milliseconds: dict[str, list[float]]) -> dict[str, Any]:
    """Quantiles by mode, and hybrid's as multiples of dense's."""
    row: dict[str, Any] = {"clients": clients}
    for mode, found in milliseconds.items():
        row |= {
            f"{mode}_p50": round(float(np.median(found)), 2),
            f"{mode}_p99": round(float(np.quantile(found, 0.99)), 2),
        }
    for quantile in ("p50", "p99"):
        row[f"hybrid_over_dense_{quantile}"] = round(row[f"hybrid_{quantile}"] / row[f"dense_{quantile}"], 3)
    return row


def equals_bm25s(
    url: str, titles: list[str], texts: list[str], queries: list[str], language: str | None
) -> bool:
    """Whether the endpoint's lexical scores are those of bm25s, which cuts, indexes and scores here."""
    import bm25s

    from embedloom.retrieval.lexical import Analyzer

    analyzer = Analyzer.of(language)
    index = bm25s.BM25(method="lucene")
    whole = (f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True))
    index.index(list(analyzer.words(whole)), show_progress=False)
    for query, words in zip(queries, analyzer.words(queries), strict=True):
        scores = np.sort(index.get_scores([word for word in words if word in index.vocab_dict] or [""]))[::-1]
        body = {"query": query, "mode": "lexical", "return_documents": False}
        hits = httpx.post(f"{url}/search", json=body, trust_env=False, timeout=60).json()["results"]
        if [hit["score"] for hit in hits] != [float(score) for score in scores[:10] if score > 0]:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5,000 documents, 60 queries, one client")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.quick:
        options.documents, options.queries, options.clients = 5_000, 60, [1]
    from embedloom.core.storage import Place
    from embedloom.encoder.registry import open_model, resolve_model

    model = open_model(resolve_model("minilm-l6"))
    titles, texts = texts_of(options.data, options.documents)
    chosen = np.random.default_rng(1).choice(len(titles), options.queries, replace=False)
    queries = [titles[row] for row in chosen]
    with tempfile.TemporaryDirectory(prefix="el-", dir="/tmp") as scratch:
        folder = Path(scratch)
        corpus = make_corpus(folder, model, titles, texts)
        facts = Place(str(corpus)).read_json("lexical.json")
        cpu = cpu_milliseconds(corpus, model, queries)
        server = servers.ours(resolve_model("minilm-l6"), folder, options.threads)
        shown = ["--corpus", str(corpus), "--documents", str(folder / "in.parquet")]
        server = replace(server, command=[*server.command, *shown])
        with servers.running(server, folder / "log") as url:
            timed(url, queries[:20], 1)
            rows = [row_of(clients, timed(url, queries, clients)) for clients in options.clients]
            equal = equals_bm25s(url, titles, texts, queries[:_CHECKED], facts["language"])
    last = rows[-1]
    result = {
        "name": "hybrid_search", "ours": last["hybrid_p99"], "peer": last["dense_p99"], "peer_name": "dense searches",
        "ratio": round(last["dense_p99"] / last["hybrid_p99"], 3), "unit": f"ms, p99, {last['clients']} clients", "equal": equal,
        "work": {"documents": options.documents, "index": facts, "queries": options.queries, "rows": rows, "cpu": cpu},
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
