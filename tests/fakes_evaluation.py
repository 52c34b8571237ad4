"""Small corpora, BEIR folders and models for the evaluation, report and lineage tests."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.prompting import PromptContract
from embedloom.core.schemas import content_id, table_from_rows
from embedloom.core.storage import Place
from embedloom.encoder.model import TokenCount
from embedloom.evaluation.jobs import Job, Outcome

INSTRUCTION = "Given a summary of a Python object, retrieve its documentation"

# Queries share no word with the wrong documents, so any sensible ranker can be checked by eye.
TOPICS = {
    "zip": (
        "Compress a folder into an archive",
        "Archives are written with the deflate algorithm, folder by folder.",
    ),
    "sort": ("Sort a list in place", "Sorting a list keeps equal items in their order and returns nothing."),
    "http": (
        "Send a request to a web server",
        "The request goes over HTTP; the server answers with a status code.",
    ),
    "date": ("Format a date as text", "Dates become text with directives such as the year and the month."),
    "regex": ("Match a regular expression", "A pattern is compiled once and matched against many strings."),
    "thread": ("Start a new thread", "Threads run concurrently and share the memory of their process."),
}


def document(name: str, text: str, title: str | None = None) -> dict[str, object]:
    return {"id": f"doc-{name}", "text": text, "title": title, "lang": "en", "source": f"tiny:{name}"}


def pair(name: str, query: str, document_id: str, **changes: object) -> dict[str, object]:
    return {
        "id": content_id(name, query),
        "query": query,
        "document_id": document_id,
        "task_type": "retrieval",
        "instruction": INSTRUCTION,
        "lang": "en",
        "document_lang": "en",
        "origin": "public",
        **changes,
    }


def make_corpus(folder: Path, split: str = "test", pairs: list[dict[str, object]] | None = None) -> Artefact:
    """A corpus artefact with six documents and, unless others are given, one natural pair each."""
    out = ArtefactWriter(Place(str(folder)), "corpus", "config", {}, "local")
    documents = [document(name, text) for name, (_, text) in TOPICS.items()]
    if pairs is None:
        pairs = [pair(name, query, f"doc-{name}") for name, (query, _) in TOPICS.items()]
    out.place.write_table(f"documents/{split}/part-000000.parquet", table_from_rows("documents", documents))
    if pairs:
        out.place.write_table(f"pairs/{split}/part-000000.parquet", table_from_rows("pairs", pairs))
    return out.commit({"rows": len(documents), "pairs": len(pairs)})


def make_beir(folder: Path, split: str = "test") -> Path:
    """The same texts as a BEIR folder."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"doc-{name}", "title": name, "text": text} for name, (_, text) in TOPICS.items()]
    queries = [{"_id": f"query-{name}", "text": query} for name, (query, _) in TOPICS.items()]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"query-{name}\tdoc-{name}\t1" for name in TOPICS)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


class FixedEncoder:
    """Stands in for an Encoder: the vector of each text is given, and every call is recorded."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors
        self.contract = PromptContract()
        self.dimension = len(next(iter(vectors.values())))
        self.backbone = SimpleNamespace(parameters=lambda: [])
        self.tokens = TokenCount()
        self.calls: list[tuple[str, str, object]] = []

    def embed(self, texts, side, task_type, instruction, max_batch_tokens=0):
        self.calls.append((side, task_type, instruction))
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


class DyingActor:
    """Stands in for the evaluation actor: the first process dies at its first unit."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def ready(self) -> None:
        return None

    def work(self, job: Job) -> Outcome:
        if job.label == "always" or not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return Outcome(figures={"tokens": 1})
