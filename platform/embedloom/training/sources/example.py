"""One example as a source gives it, before it becomes token ids."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError

# Their documents are label names, which carry no instruction (arXiv 2511.07025 §3.1).


@dataclass(frozen=True, slots=True)
class SourceExample:
    """Texts of one query; an empty text or ``problem`` makes it a bad row."""

    id: str
    query: str
    positive: str
    negatives: list[str]
    task_type: str
    instruction: str | None  # of the query; None: the contract's own for the task type
    document_instruction: str | None = ""  # before the documents too; None: bare; "": as the contract has it
    dataset: str = ""  # which set the row is of, where its source holds several
    problem: tuple[str, str] | None = None  # reason and detail
    others: tuple[str, ...] = ()  # further right answers: not trained towards here, and never negatives


def bad_row(row_id: str, reason: str, detail: str) -> SourceExample:
    """A row that cannot become an example."""
    return SourceExample(row_id, "", "", [], "retrieval", None, None, problem=(reason, detail))


def plain_example(
    source: TrainingSource,
    row_id: str,
    query: Any,
    positive: Any,
    negatives: list[Any],
    own_instruction: str | None = None,
    others: Iterable[Any] = (),
) -> SourceExample:
    """An example of a format whose rows state no task type; values that are no texts make it a bad row."""
    for name, value in (("query", query), ("positive", positive)):
        if value is not None and not isinstance(value, str):
            return bad_row(row_id, "not_text", f"{name} is a {type(value).__name__}")
    wrong = next((value for value in negatives if not isinstance(value, str)), None)
    if wrong is not None:
        return bad_row(row_id, "not_text", f"a negative is a {type(wrong).__name__}")
    return SourceExample(
        row_id, query or "", positive or "", [text for text in negatives if text.strip()],
        source.task_type, source.instruction or own_instruction,
        others=tuple(text for text in others if isinstance(text, str) and text.strip()),
    )  # fmt: skip


def not_empty(source: TrainingSource, examples: Iterator[SourceExample]) -> Iterator[SourceExample]:
    """The examples; a source without any is an error.

    Raises:
        DataError: nothing came.
    """
    empty = True
    for example in examples:
        empty = False
        yield example
    if empty:
        raise DataError(f"source {source.name!r}: {source.path or 'mined examples'} has no rows")
