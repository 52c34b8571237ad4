"""Rows on their way from the tasks of one step to those of the next: Arrow files, in each a batch for every receiver.

A shuffle over files. Ray Data's own (``repartition(keys=...)``) computes again what a killed run had finished, as its
checkpoints end at a shuffle; files that are there stay done. A sender writes one file whatever the number of receivers,
so their number grows with the rows and not with its square.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedloom.compute.shards import Piece, Tasks
from embedloom.core.storage import Place

_RECEIVERS = b"receivers"
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")
_DONE = "done"
BATCH_ROWS = 2_500  # of the files that a step keeps for itself

Numbers = npt.NDArray[np.int64]
Counts = dict[str, Any]


def send(place: Place, name: str, table: pa.Table, receivers: npt.NDArray[Any]) -> None:
    """Write rows for their receivers; no rows, no file.

    Args:
        place: of the steps.
        name: of the file: the folder the receivers read, and the sender.
        table: the rows.
        receivers: number of the receiver of each row; rows for one keep their order.
    """
    if not table.num_rows:
        return
    order = np.argsort(receivers, kind="stable")
    present, starts = np.unique(receivers[order], return_index=True)
    bounds = [*starts.tolist(), table.num_rows]
    ordered = table.take(pa.array(order)).combine_chunks()
    named = {_RECEIVERS: present.astype("<i8").tobytes()}
    slices = (ordered.slice(start, stop - start) for start, stop in pairwise(bounds))
    _write(place, name, table.schema.with_metadata(named), slices)


def received(
    place: Place, folder: str, receiver: int, schema: pa.Schema, columns: Sequence[str] | None = None
) -> pa.Table:
    """All rows sent to one receiver, sender by sender in the order of their names.

    Args:
        place: of the steps.
        folder: that the senders wrote in.
        receiver: its number.
        schema: of the rows, for where there are none.
        columns: those to read; None: all.
    """
    found = []
    for name in place.names(folder, ".arrow"):
        with arrow_file(place, name, schema, columns) as file:
            present = np.frombuffer(file.schema.metadata[_RECEIVERS], dtype="<i8")
            slot = int(np.searchsorted(present, receiver))
            if slot < len(present) and present[slot] == receiver:
                found.append(pa.Table.from_batches([file.get_batch(slot)]).replace_schema_metadata(None))
    return pa.concat_tables(found) if found else _chosen(schema, columns).empty_table()


def write_rows(place: Place, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write a step's own rows in batches of ``BATCH_ROWS``; returns their number; no rows, no file."""
    rows = 0

    def batches() -> Iterator[pa.Table]:
        nonlocal rows
        for table in _rebatched(tables):
            rows += table.num_rows
            yield table

    found = batches()
    if first := next(found, None):
        _write(place, name, schema, chain([first], found))
    return rows


def _rebatched(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows in tables of BATCH_ROWS; the last may be shorter."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= BATCH_ROWS:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, BATCH_ROWS).combine_chunks()
            waiting, count = [whole.slice(BATCH_ROWS)], count - BATCH_ROWS
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


def read_rows(
    place: Place, name: str, schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """A step's own rows, batch by batch; none where it wrote no file."""
    if not place.exists(name):
        return
    with arrow_file(place, name, schema, columns) as file:
        for number in range(file.num_record_batches):
            yield pa.Table.from_batches([file.get_batch(number)])


def read_piece(place: Place, piece: Piece, schema: pa.Schema) -> Iterator[pa.Table]:
    """Some of a step's own rows, from the batches that hold them."""
    with arrow_file(place, piece.file, schema, None) as file:
        for number in range(piece.start // BATCH_ROWS, -(-piece.stop // BATCH_ROWS)):
            first = number * BATCH_ROWS
            table = pa.Table.from_batches([file.get_batch(number)])
            start = max(piece.start - first, 0)
            yield table.slice(start, min(piece.stop - first, table.num_rows) - start)


def _write(place: Place, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=_OPTIONS) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))
    place.write_bytes(name, sink.getvalue())


@contextmanager
def arrow_file(
    place: Place, name: str, schema: pa.Schema, columns: Sequence[str] | None
) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """An open file; columns that are not asked for are not decompressed."""
    fields = (
        None
        if columns is None
        else [schema.get_field_index(column) for column in sorted(columns, key=schema.get_field_index)]
    )
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    with place.open_input(name) as stream:
        yield pa.ipc.open_file(stream, options=options)


def _chosen(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    return schema if columns is None else pa.schema([field for field in schema if field.name in columns])


# Steps: a function over numbered items, of which those that are done are never done again.


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs the steps of one build.

    Attributes:
        place: where rows on their way lie.
        tasks: runs a function over many items, in order.
        resumable: whether finished items leave a mark, so that a later process goes on behind them.
    """

    place: Place
    tasks: Tasks
    resumable: bool

    def run(
        self, step: str, function: Callable[..., Counts], items: Sequence[Any], *shared: Any, **options: Any
    ) -> Iterator[Counts]:
        """What ``function(item, number, *shared)`` counts of every item, in order.

        Args:
            step: name of its marks.
            function: at module level; what it writes is written whole before it returns.
            items: picklable.
            shared: further arguments.
            options: of ``tasks``.
        """
        have = (
            {name.rpartition("/")[2] for name in self.place.names(f"{_DONE}/{step}")}
            if self.resumable
            else set()
        )
        todo = [(number, item) for number, item in enumerate(items) if _mark(number) not in have]
        where = self.place if self.resumable else None
        results = self.tasks(
            "corpus", _run_one, todo, function, step, where, shared, **{"cpus": 1.0, **options}
        )
        for number in range(len(items)):
            name = _mark(number)
            yield self.place.read_json(f"{_DONE}/{step}/{name}") if name in have else next(results)


def _mark(number: int) -> str:
    return f"{number:06d}.json"


def _run_one(
    item: tuple[int, Any],
    function: Callable[..., Counts],
    step: str,
    place: Place | None,
    shared: tuple[Any, ...],
) -> Counts:
    number, content = item
    counts = function(content, number, *shared)
    if place is not None:
        place.write_json(f"{_DONE}/{step}/{_mark(number)}", counts)
    return counts
