"""How varied the written rows are, measured on a sample: wording, agreement between generators, spread of vectors, coverage."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasketch import MinHash
from sklearn.cluster import MiniBatchKMeans

from embedloom.compute.shards import run_tasks
from embedloom.core.storage import Place
from embedloom.core.text import words_of
from embedloom.retrieval.stored import stored_vectors
from embedloom.synthesis.refusals import Round

# How varied the written rows are, on a sample: wording, agreement between generators, spread of vectors, coverage.
#
# The paper gives task diversity as the reason why a mix of generators beats the best one (arXiv 2511.07025 §6.2).


Vectors = npt.NDArray[np.float32]

_DISTINCT = (1, 2, 3)
_OVERLAP_WORDS = 3
_PERMUTATIONS = 512  # standard error of an overlap: at most 0.022
_SEED = 1


def measure(
    texts: Mapping[str, Sequence[str]],
    vectors: Vectors | None = None,
    corpus: Vectors | None = None,
    seeds: Sequence[int] | None = None,
    clusters: int = 100,
) -> dict[str, Any]:
    """All measures that the given inputs allow.

    Args:
        texts: generator -> a sample of its queries.
        vectors: unit vectors of those queries under the teacher, in the same order.
        corpus: unit vectors of a sample of the seed corpus.
        seeds: which of that sample were seed documents.
        clusters: k-means clusters of the corpus sample; fewer for a small one.

    Returns:
        ``sample`` (texts per generator), ``distinct`` (generator or "all" -> {"1", "2", "3"}), ``overlap`` (rows of
        left, right, jaccard) and, with vectors, ``mean_cosine`` and ``coverage`` (clusters, hit, share).
    """
    together = [text for one in texts.values() for text in one]
    groups = {**texts, "all": together} if len(texts) > 1 else dict(texts)
    found: dict[str, Any] = {
        "sample": {name: len(one) for name, one in texts.items()},
        "distinct": {
            name: {str(size): distinct(one, size) for size in _DISTINCT} for name, one in groups.items()
        },
        "overlap": overlap(texts),
    }
    if vectors is not None:
        found["mean_cosine"] = mean_cosine(vectors)
    if corpus is not None and seeds is not None:
        found["coverage"] = coverage(corpus, seeds, clusters)
    return found


def distinct(texts: Sequence[str], size: int) -> float | None:
    """Distinct-n: different word n-grams over all (arXiv 1510.03055); None if no text is that long.

    It falls as a sample grows, so only samples of like size compare.
    """
    grams = [gram for text in texts for gram in _ngrams(text, size)]
    return len(set(grams)) / len(grams) if grams else None


def overlap(texts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Estimated Jaccard similarity of the sets of word 3-grams of each two generators."""
    sketches = {}
    for name, one in texts.items():
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=_SEED, scheme="affine32")
        grams = {" ".join(gram).encode() for text in one for gram in _ngrams(text, _OVERLAP_WORDS)}
        if grams:
            sketch.update_batch(sorted(grams))
            sketches[name] = sketch
    return [
        {"left": left, "right": right, "jaccard": float(sketches[left].jaccard(sketches[right]))}
        for left, right in combinations(sketches, 2)
    ]


def mean_cosine(vectors: Vectors) -> float | None:
    """Mean cosine of all pairs of different rows; None for fewer than two.

    Args:
        vectors: unit length, [texts, dimensions]. |sum|² = n + 2 Σ cosines, so no pair is formed.
    """
    count = len(vectors)
    if count < 2:
        return None
    total = vectors.astype(np.float64).sum(axis=0)
    return float((total @ total - count) / (count * (count - 1)))


def coverage(corpus: Vectors, seeds: Sequence[int], clusters: int) -> dict[str, Any]:
    """Share of the corpus's k-means clusters that hold a seed document.

    Args:
        corpus: vectors of a sample of the corpus, [documents, dimensions].
        seeds: rows of it that rows were written for.
        clusters: at most one for every ten documents.
    """
    wanted = max(1, min(clusters, len(corpus) // 10))
    model = MiniBatchKMeans(n_clusters=wanted, random_state=_SEED, n_init=3)
    labels = model.fit_predict(corpus)
    filled = len(np.unique(labels))
    hit = len(np.unique(labels[np.asarray(seeds, dtype=np.int64)])) if len(seeds) else 0
    return {"clusters": filled, "hit": hit, "share": hit / filled, "documents": len(corpus)}


def _ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    words = words_of(text)
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


# How varied the rows are, measured on a sample in a Ray task: some thousand rows, those with the lowest ids.


_SAMPLE = 10_000
_ASKED_VECTORS = "asked_vectors"
_DOCUMENT_VECTORS = "steps/document_vectors"


def measured_diversity(
    stage: str, place: Place, files: Sequence[str], rounds: Sequence[Round]
) -> dict[str, Any]:
    """``diversity.measure`` of the synthetic rows in these files; vectors count where a round trip made them."""
    (found,) = run_tasks(stage, _measure, [tuple(files)], tuple(rounds), place, cpus=1.0)
    return found


def _measure(files: Sequence[str], rounds: Sequence[Round], place: Place) -> dict[str, Any]:
    sample = _lowest(place, files)
    texts: dict[str, list[str]] = {}
    ordered: list[dict[str, Any]] = []
    for name in sorted({row["generator"] for row in sample}):
        own = [row for row in sample if row["generator"] == name]
        texts[name] = [row["query"] for row in own]
        ordered += own
    if not texts:
        return {}
    queries = [name for one in rounds for name in place.names(f"{one.folder}/{_ASKED_VECTORS}", ".parquet")]
    if not queries:
        return measure(texts)
    by_id = _vectors(place, queries, [row["id"] for row in ordered])
    vectors = np.stack([by_id[row["id"]] for row in ordered if row["id"] in by_id])
    documents = place.names(_DOCUMENT_VECTORS, ".parquet")
    names = _lowest_ids(place, documents)
    corpus = _vectors(place, documents, names)
    read = {row["document_id"] for row in ordered}
    seeds = [number for number, name in enumerate(names) if name in read]
    return measure(texts, vectors, np.stack([corpus[name] for name in names]), seeds)


def _lowest(place: Place, files: Sequence[str]) -> list[dict[str, Any]]:
    """The synthetic rows with the lowest ids, in their order."""
    kept = None
    for file in files:
        table = place.read_table(file, ["id", "query", "document_id", "generator"])
        table = table.filter(pc.is_valid(table.column("generator")))
        kept = table if kept is None else pa.concat_tables([kept, table])
        kept = kept.take(pc.sort_indices(kept, [("id", "ascending")])).slice(0, _SAMPLE)
    return [] if kept is None else list(kept.to_pylist())


def _lowest_ids(place: Place, files: Sequence[str]) -> list[str]:
    found: list[str] = []
    for file in files:
        found = sorted([*found, *place.read_table(file, ["id"]).column("id").to_pylist()])[:_SAMPLE]
    return found


def _vectors(place: Place, files: Sequence[str], ids: Sequence[str]) -> dict[str, Any]:
    wanted = pa.array(ids, pa.string())
    found: dict[str, Any] = {}
    for file in files:
        table = place.read_table(file, ["id", "vector"])
        table = table.filter(pc.is_in(table.column("id"), value_set=wanted))
        found.update(zip(table.column("id").to_pylist(), stored_vectors(table, file), strict=True))
    return found
