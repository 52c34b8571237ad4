"""Sources: one reader a format, all giving the same rows; a reader streams, it never holds a whole file.

Pairs alone are gathered: a text that answers many queries must be one document, or the others would be its negatives.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

from embedloom.config.data import CorpusSource
from embedloom.corpus.beir import read_beir
from embedloom.corpus.columns import one_document_a_text
from embedloom.corpus.hub import read_hub_dataset
from embedloom.corpus.pseudo_queries import with_query
from embedloom.corpus.python_docs import read_python_docs
from embedloom.corpus.rejects import Rejects
from embedloom.corpus.rows import SourceRow
from embedloom.corpus.tabular import read_csv, read_jsonl, read_parquet
from embedloom.corpus.text_files import read_text_files
from embedloom.errors import DataError

Reader = Callable[[CorpusSource], Iterator[SourceRow]]

READERS: dict[str, Reader] = {
    "python_docs": read_python_docs,
    "parquet": read_parquet,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "text": read_text_files,
    "beir": read_beir,
    "huggingface": read_hub_dataset,
}


def read_source(source: CorpusSource, rejects: Rejects | None = None) -> Iterator[SourceRow]:
    """Stream the rows of a source, at most ``source.limit`` of them, always in the same order.

    Args:
        source: its section.
        rejects: takes note of what a reader itself leaves out.

    Raises:
        DataError: nothing there, not readable, a column that is not there, or no row at all.
    """
    count = 0
    read = read_beir(source, rejects) if source.format == "beir" else READERS[source.format](source)
    rows: Iterable[SourceRow] = islice(read, source.limit)
    for row in one_document_a_text(rows) if source.query_column is not None else rows:
        count += 1
        if source.query_from is not None:
            row = with_query(row, source.query_from, source.instruction)
        yield replace(row, dataset=source.dataset or "")
    if count == 0:
        place = source.path or f"packages {list(source.packages)}"
        raise DataError(
            f"corpus.sources: {place} ({source.format}) holds no document; give a source with at least one"
        )
