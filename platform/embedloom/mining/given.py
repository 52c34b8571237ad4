"""Texts that come with pairs: positives the corpus lacks, given negatives, and the labels of a classification task."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.engines.shards import PART_PATTERN
from embedloom.instructions import opposite_task_type
from embedloom.mining.select import query_seed
from embedloom.ngrams import folded
from embedloom.storage import Place

GIVEN_FOLDER = "given"
CORPUS = "corpus"  # the collection of the corpus's own documents
# Texts that are scored but never searched.
UNSEARCHED = "unsearched"
_WRONG_LABELS = 16  # drawn per query; the selection takes the first few
GIVEN_SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("task_type", pa.string()), ("instruction", pa.string())]
)


def wrong_labels(labels: Sequence[str], right: Collection[str], query_id: str) -> list[str]:
    """Labels drawn at random among the wrong ones of a task (paper §3.2), the same for the same query id."""
    known = {folded(label) for label in right}
    wrong = [label for label in labels if folded(label) not in known]
    order = np.random.default_rng(query_seed(query_id, "labels")).permutation(len(wrong))
    return [wrong[number] for number in order[:_WRONG_LABELS]]


class GivenTexts:
    """Writes each given text once, into the collection that is searched, or else into ``unsearched``."""

    def __init__(self, out: Place, shard_rows: int) -> None:
        self._out = out
        self._shard_rows = shard_rows
        self._seen: dict[str, set[str]] = {}
        self._waiting: dict[str, list[dict[str, str]]] = {}
        self._parts: dict[str, int] = {}

    def add(self, row: dict[str, Any], name: Callable[[str, str, str], str]) -> None:
        """Take the texts of one query row; ``name`` gives their ids."""
        group = UNSEARCHED if row["collection"] == CORPUS else row["collection"]
        for text in [row["positive"] or "", *(row["negatives"] or [])]:
            identifier = name(text, row["task_type"], row["instruction"])
            seen = self._seen.setdefault(group, set())
            if identifier in seen or not text.strip():
                continue
            seen.add(identifier)
            waiting = self._waiting.setdefault(group, [])
            waiting.append(
                {
                    "id": identifier,
                    "text": text,
                    "task_type": opposite_task_type(row["task_type"]),
                    "instruction": row["instruction"],
                }
            )
            if len(waiting) == self._shard_rows:
                self._write(group)

    def finish(self) -> list[str]:
        """Write what is left; names of the groups."""
        for group in list(self._waiting):
            self._write(group)
        return sorted(self._parts)

    def _write(self, group: str) -> None:
        number = self._parts.get(group, 0)
        table = pa.Table.from_pylist(self._waiting.pop(group), schema=GIVEN_SCHEMA)
        self._out.write_table(f"{GIVEN_FOLDER}/{group}/{PART_PATTERN.format(number)}", table)
        self._parts[group] = number + 1
