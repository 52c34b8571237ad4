"""Small corpus and pair artefacts for the mining tests."""

import random

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.records import table_from_rows
from embedloom.storage import Place

WORDS = [
    "read", "write", "parquet", "table", "column", "filter", "sort", "join", "merge", "array", "vector", "matrix",
    "socket", "thread", "queue", "lock",
]  # fmt: skip


def document_row(identifier, text, title=None):
    return {"id": identifier, "text": text, "title": title, "lang": "en", "source": "test"}


def pair_row(identifier, query, document_id, **changes):
    row = {
        "id": identifier, "query": query, "document_id": document_id, "task_type": "retrieval",
        "instruction": "Find the text", "lang": "en", "document_lang": "en", "origin": "public",
    }  # fmt: skip
    return row | changes


def random_documents(count, seed=0):
    generator = random.Random(seed)
    return [
        document_row(f"d{n:04d}", " ".join(generator.choices(WORDS, k=6)) + f" {n}") for n in range(count)
    ]


def make_artefact(folder, kind, tables):
    """A finished artefact from {file name: (kind of table, rows)}."""
    writer = ArtefactWriter(Place(str(folder)), kind, "config", {}, "local")
    for name, (table_kind, rows) in tables.items():
        writer.place.write_table(name, table_from_rows(table_kind, rows))
    return writer.commit({"rows": 1})


def make_corpus(folder, documents, pairs=(), cuts=1) -> Artefact:
    """A corpus artefact whose training documents are cut into several files."""
    step = -(-len(documents) // cuts)
    tables = {
        f"documents/train/part-{n:06d}.parquet": ("documents", documents[n * step : (n + 1) * step])
        for n in range(cuts)
    }
    if pairs:
        tables["pairs/train/part-000000.parquet"] = ("pairs", list(pairs))
    return make_artefact(folder, "corpus", tables)


def make_synthesis(folder, pairs) -> Artefact:
    return make_artefact(folder, "synthesis", {"pairs/part-000000.parquet": ("pairs", list(pairs))})
