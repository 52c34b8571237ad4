"""Tables as plain text, for the terminal and for logs."""

import io
from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 10_000  # no column is cut or wrapped, in a narrow terminal's log either


def text_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: Collection[int] = (0,),
    style: box.Box | None = box.MARKDOWN,
) -> list[str]:
    """Lines of a plain table as wide as its cells.

    Args:
        header: of the columns.
        rows: a cell a column each.
        words: columns that begin at the left; the others hold numbers, which end at the right.
        style: None: columns with two blanks between them.
    """
    padding = (0, 1) if style else (0, 2, 0, 0)
    table = Table(box=style, padding=padding, pad_edge=bool(style))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(
        file=stream, width=_WIDTH, color_system=None, force_terminal=False, markup=False, emoji=False
    ).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]
