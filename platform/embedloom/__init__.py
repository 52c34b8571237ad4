"""embedloom: from a document corpus to a served text-embedding model, on one Ray cluster.

On Ray Datasets of your own: ``embedloom.embed``, or ``embedloom.Embedder`` for ``map_batches``; ``embedloom.mine`` and
``embedloom.synthesize``.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported when they are asked for (PEP 562): they need torch and Ray, and --help does not. Their types: __init__.pyi.
_FROM = {
    "Embedder": "embedding", "embed": "embedding", "FaissSink": "parquet", "LanceDBSink": "lance", "LanceSink": "lance",
    "ParquetSink": "parquet", "PgvectorSink": "postgres", "QdrantSink": "qdrant", "VectorSink": "sinks", "mine": "stages",
    "synthesize": "stages",
}  # fmt: skip
__all__ = [
    "Embedder", "FaissSink", "LanceDBSink", "LanceSink", "ParquetSink", "PgvectorSink", "QdrantSink", "VectorSink",
    "__version__", "embed", "mine", "synthesize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"embedloom.raydata.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
