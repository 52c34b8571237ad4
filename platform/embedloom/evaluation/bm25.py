"""The BM25 baseline: mteb's own, so that its score compares with the one on mteb's leaderboard."""

import importlib.util
from typing import Any

import mteb

from embedloom.errors import MissingDependency

BM25_NAME = "mteb/baseline-bm25s"
_PACKAGES = {"bm25s": "bm25s", "Stemmer": "PyStemmer"}  # import name -> distribution


def check_bm25() -> None:
    """Raise MissingDependency if a package that mteb's BM25 needs is absent."""
    for module, distribution in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependency(distribution, "cpu", "the bm25 baseline of evaluation.baselines")


def bm25_revision() -> str:
    """mteb's revision of the baseline, which names its result folder."""
    return str(mteb.get_model_meta(BM25_NAME).revision)


def load_bm25() -> Any:
    """BM25 behind mteb's search protocol: Lucene scoring, stop words and stemmer by the task's language."""
    check_bm25()
    return mteb.get_model_meta(BM25_NAME).load_model()
