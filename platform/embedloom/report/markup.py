"""Pieces of HTML that several sections of the report share."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def table_markup(header: Sequence[str], body: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """An HTML table; columns not in ``words`` hold numbers and are set flush right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ("" if index in words else ' class="number"' for index in range(len(row)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    rows = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in body)
    return f'<div class="scroll"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>\n{rows}</tbody></table></div>'


def number_text(value: Any) -> str:
    """A count or a measure for people: thousands apart, at most four decimals; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}".rstrip("0").rstrip(".")
