"""Which documents become seeds, and which LLM writes for each: both decided by hash, exactly and for good."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from embedloom.engines.shards import PART_PATTERN, parquet_rows
from embedloom.errors import DataError
from embedloom.records import check_table
from embedloom.storage import Place

WORK_FOLDER = "work"
PLAN_FILE = f"{WORK_FOLDER}/plan.json"


def quotas(total: int, weights: Sequence[float]) -> list[int]:
    """Share ``total`` out by weight in whole numbers that sum to it (largest remainder, ties to the first)."""
    whole = math.fsum(weights)
    exact = [total * weight / whole for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def hash_ranks(seed: int, ids: Sequence[str]) -> np.ndarray:
    """A 64-bit number per id, ``uint64 [len(ids)]``, that depends on nothing but the seed and the id."""
    digests = b"".join(hashlib.blake2b(f"{seed}:{one}".encode(), digest_size=8).digest() for one in ids)
    return np.frombuffer(digests, dtype="<u8")


def write_work(
    corpus: Place, folder: str, out: Place, documents: int, weights: Sequence[float], seed: int
) -> list[int]:
    """Write each generator's seed documents to ``work/<generator index>/``; finished work is kept.

    The documents with the lowest hashes are chosen, and the generators take consecutive stretches of that
    order, so two thresholds say all there is to say about a generator: the corpus is streamed twice, file by
    file, and only eight bytes per document are held.

    Args:
        corpus: place of the documents.
        folder: its folder of documents tables.
        out: place of the artefact being built.
        documents: seed documents wanted; fewer if the corpus has fewer.
        weights: one per generator.
        seed: of the run.

    Returns:
        Documents per generator.

    Raises:
        DataError: the corpus has no document.
    """
    if out.exists(PLAN_FILE):
        return [int(count) for count in out.read_json(PLAN_FILE)["documents"]]
    files = [name for name, _ in parquet_rows(corpus, folder)]
    ranks = np.sort(np.concatenate([hash_ranks(seed, _ids(corpus, name)) for name in files]))
    if len(ranks) == 0:
        raise DataError(f"{corpus.uri}/{folder}: no document to write queries for")
    counts = quotas(min(documents, len(ranks)), weights)
    # ends[i]: the highest hash generator i takes; one without documents ends where its predecessor does.
    ends = np.asarray([ranks[stop - 1] if stop else 0 for stop in np.cumsum(counts)], dtype=np.uint64)
    for number, name in enumerate(files):
        table = check_table("documents", corpus.read_table(name), f"{corpus.uri}/{name}")
        owners = np.searchsorted(ends, hash_ranks(seed, table.column("id").to_pylist()), side="left")
        for generator in range(len(counts)):
            chosen = table.filter(pa.array(owners == generator))
            if chosen.num_rows:
                out.write_table(f"{work_folder(generator)}/{PART_PATTERN.format(number)}", chosen)
    out.write_json(PLAN_FILE, {"documents": counts})
    return counts


def work_folder(generator: int) -> str:
    """Where a generator's seed documents stand."""
    return f"{WORK_FOLDER}/{generator}"


def _ids(corpus: Place, name: str) -> list[str]:
    ids: list[str] = corpus.read_table(name, columns=["id"]).column("id").to_pylist()
    return ids
