"""Readers of formats with one row a query: sentence-transformers columns and FlagEmbedding JSON lines."""

import re
from collections.abc import Iterator
from typing import Any

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.formats import JSONL_ENDINGS, json_lines
from embedloom.training.sources.example import SourceExample, bad_row, plain_example
from embedloom.training.sources.tables import records, source_files

_NUMBERED = re.compile(r"^negative_(\d+)$")


def read_sentence_transformers(source: TrainingSource) -> Iterator[SourceExample]:
    """Rows with an anchor, a positive, and ``negative``, ``negative_1`` ... or a list ``negatives``.

    Raises:
        DataError: a row without the two columns; other columns are passed over.
    """
    for place, record in records(source):
        for key, column in (
            ("query_column", source.query_column),
            ("positive_column", source.positive_column),
        ):
            if column not in record:
                raise DataError(
                    f"source {source.name!r}: {place} has no column {column!r} ({key}); found {list(record)}"
                )
        row_id = str(record.get("id") or place)
        yield plain_example(
            source, row_id, record[source.query_column], record[source.positive_column], _negatives(record)
        )


def _negatives(record: dict[str, Any]) -> list[Any]:
    numbered = sorted((int(match[1]), name) for name in record if (match := _NUMBERED.match(name)))
    found = [record["negative"]] if record.get("negative") is not None else []
    found += [record[name] for _, name in numbered if record[name] is not None]
    return found + list(record.get("negatives") or [])


def read_flagembedding(source: TrainingSource) -> Iterator[SourceExample]:
    """Lines with ``query``, ``pos``, ``neg`` and perhaps ``prompt``; the first positive counts, the others are right too.

    A ``prompt`` is taken as the instruction where the source config gives none.

    Raises:
        DataError: a line that is not a JSON object, or lacks a key.
    """
    for path in source_files(source, JSONL_ENDINGS):
        for number, record in json_lines(path):
            place = f"{path.name}:{number}"
            for key in ("query", "pos"):
                if key not in record:
                    raise DataError(
                        f"source {source.name!r}: {place} has no key {key!r}; found {list(record)}"
                    )
            positives, negatives = record["pos"], record.get("neg") or []
            if not isinstance(positives, list) or not isinstance(negatives, list):
                yield bad_row(place, "not_a_list", "pos and neg must be lists of texts")
                continue
            prompt = record.get("prompt")
            yield plain_example(
                source, str(record.get("id") or place), record["query"], positives[0] if positives else None,
                negatives, prompt if isinstance(prompt, str) and prompt else None, positives[1:],
            )  # fmt: skip
