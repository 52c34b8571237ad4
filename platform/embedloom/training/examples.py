"""Mined examples as token groups: one query, its positive, and exactly ``negatives`` negatives."""

from typing import Any

import pyarrow as pa

from embedloom.encoder.model import Encoder
from embedloom.errors import DataError
from embedloom.records import check_unique_ids
from embedloom.storage import Place
from embedloom.training.groups import Group


class ExampleStore:
    """The examples of a mining artefact, tokenized on demand."""

    def __init__(self, table: pa.Table, encoder: Encoder, negatives: int, source: str) -> None:
        if table.num_rows == 0:
            raise DataError(f"{source}: no examples to train on")
        check_unique_ids(table, source)
        self._table = table
        self._encoder = encoder
        self._negatives = negatives
        self._source = source
        self.repeated_negatives = 0

    @classmethod
    def open(cls, place: Place, encoder: Encoder, negatives: int) -> "ExampleStore":
        """Read ``examples/`` of a mining artefact."""
        return cls(place.read_tables("examples", "examples"), encoder, negatives, f"{place.uri}/examples")

    @property
    def datasets(self) -> list[str]:
        """Dataset name of every row."""
        return [str(name) for name in self._table.column("dataset").to_pylist()]

    def groups(self, rows: list[int]) -> list[Group]:
        """Tokenized groups of these rows, in order.

        Raises:
            DataError: a row without any negative, named by id.
        """
        records = self._table.take(rows).to_pylist()
        queries = [self._query_ids(record) for record in records]
        documents = [self._document_ids(record) for record in records]
        return [
            Group(record["id"], query, own)
            for record, query, own in zip(records, queries, documents, strict=True)
        ]

    def _query_ids(self, record: dict[str, Any]) -> list[int]:
        return self._encoder.tokenize(
            [record["query"]], "query", record["task_type"], record["query_instruction"] or None
        )[0]

    def _document_ids(self, record: dict[str, Any]) -> list[list[int]]:
        negatives = record["negatives"]
        if not negatives:
            raise DataError(f"{self._source}: example {record['id']!r} has no negatives")
        if len(negatives) < self._negatives:
            self.repeated_negatives += self._negatives - len(negatives)
        # Short lists repeat cyclically, as the released trainer of the paper's model does.
        texts = [record["positive"], *(negatives[k % len(negatives)] for k in range(self._negatives))]
        instruction = record["document_instruction"]
        if instruction:
            texts = [
                self._encoder.contract.format(text, "query", record["task_type"], instruction)
                for text in texts
            ]
        # "retrieval" documents are bare: label names and passages carry no instruction (paper §3.1).
        return self._encoder.tokenize(texts, "document", "retrieval")
