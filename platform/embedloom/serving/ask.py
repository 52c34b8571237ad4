"""Asking the endpoint as a client would, and ranking the run's documents by the answer."""

import numpy as np
import pyarrow.compute as pc

from embedloom.artefacts import Artefact
from embedloom.errors import ServeError
from embedloom.records import check_table
from embedloom.retrieval.corpora import DOCUMENTS_FOLDER, SPLITS, VECTORS_FOLDER
from embedloom.retrieval.vector_files import read_vectors
from embedloom.serving.address import ask

_SHOWN_CHARACTERS = 160


def nearest_documents(
    url: str,
    model: str,
    question: str,
    corpus: Artefact,
    vectors: Artefact,
    count: int = 3,
    timeout_seconds: float = 60,
    task: str | None = None,
) -> str:
    """Embed a question over HTTP and list the nearest documents of the corpus.

    Args:
        url: the endpoint's ``…/v1``.
        model: served model name.
        question: the query.
        corpus: artefact with the documents.
        vectors: artefact with their vectors; its contract must be the endpoint's.
        count: documents listed.
        timeout_seconds: of the request.
        task: a task type, or a task of the model by name; None: the model's default, as for any client.

    Raises:
        ServeError: the endpoint refused or did not answer.
        DataError: the vectors are of another contract than recorded.
    """
    query = np.asarray(_embed(url, model, question, timeout_seconds, task), dtype=np.float32)
    ids, matrix = read_vectors(vectors.place, VECTORS_FOLDER, vectors.manifest["details"]["contract_hash"])
    if matrix.shape[1] < len(query):  # vectors cut to their first dimensions are asked with a query cut alike
        query = query[: matrix.shape[1]] / np.linalg.norm(query[: matrix.shape[1]])
    scores = matrix @ query
    lines = [f"? {question}"]
    for position in np.argsort(-scores, kind="stable")[:count]:
        document = _document(corpus, ids[position])
        text = " ".join(str(document["text"]).split())[:_SHOWN_CHARACTERS]
        lines.append(f"  {scores[position]:.3f}  {document['source']}\n         {text}")
    return "\n".join(lines)


def _embed(url: str, model: str, question: str, timeout_seconds: float, task: str | None) -> list[float]:
    asked = {"model": model, "input": question, "input_type": "query"} | (
        {} if task is None else {"task": task}
    )
    return list(ask(f"{url}/embeddings", timeout_seconds, asked)["data"][0]["embedding"])


def _document(corpus: Artefact, document_id: str) -> dict[str, object]:
    for split in SPLITS:
        for name in corpus.place.names(f"{DOCUMENTS_FOLDER}/{split}", ".parquet"):
            table = check_table("documents", corpus.place.read_table(name), name)
            found = table.filter(pc.equal(table.column("id"), document_id))
            if found.num_rows:
                return dict(found.to_pylist()[0])
    raise ServeError(f"document {document_id} has a vector, but is not in the corpus")
