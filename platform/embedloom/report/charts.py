"""Pieces of the report's HTML: tables, and inline SVG charts (horizontal bars, histograms, lines). No script, no colours
beyond CSS classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


def table_markup(header: Sequence[str], body: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """An HTML table; columns not in ``words`` hold numbers and are set flush right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ("" if index in words else ' class="number"' for index in range(len(row)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    rows = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in body)
    return f'<div class="scroll"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>\n{rows}</tbody></table></div>'


def percent_text(share: float | None) -> str:
    """``12.34%``, or a dash."""
    return "-" if share is None else f"{share:.2%}"


def number_text(value: Any) -> str:
    """A count or a measure for people: thousands apart, at most four decimals; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}".rstrip("0").rstrip(".")


_ROW = 26  # height of a bar with its gap, in pixels
_LABEL = 220  # room for labels left of the bars
_BAR = 540
_VALUE = 110
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 696, 26, 246  # plotting area of a line chart
_LINE_SERIES = 8  # classes s0 to s7 in the style sheet


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; ``tone`` is its CSS class."""

    label: str
    value: float
    text: str
    tone: str = "plain"


def bar_chart(title: str, bars: Sequence[Bar], full: float | None = None) -> str:
    """Horizontal bars with their values; ``full`` is the value of a bar across the whole width.

    Args:
        title: for screen readers.
        bars: top to bottom; values below 0 are drawn as 0.
        full: default the largest value.
    """
    largest = max([full or 0.0, *(bar.value for bar in bars)]) or 1.0
    rows = []
    for index, bar in enumerate(bars):
        top = index * _ROW
        width = max(0.0, bar.value) / largest * _BAR
        rows.append(
            f'<text class="label" x="{_LABEL - 8}" y="{top + 17}" text-anchor="end">{escape(_short(bar.label))}</text>'
            f'<rect class="{escape(bar.tone)}" x="{_LABEL}" y="{top + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2"/>'
            f'<text class="value" x="{_LABEL + width + 6:.1f}" y="{top + 17}">{escape(bar.text)}</text>'
        )
    return _svg(title, _LABEL + _BAR + _VALUE, len(bars) * _ROW, rows)


def line_chart(
    title: str, lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str
) -> str:
    """Lines over a common axis with a legend.

    Args:
        title: for screen readers.
        lines: name -> (x, y) points; names without points are left out.
        x_label: under the horizontal axis.
        y_label: over the vertical axis.
    """
    drawn = {name: points for name, points in lines.items() if points}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    frame = _Frame(ticks(min(xs), max(xs)), ticks(min(0.0, *ys), max(ys)))
    parts = frame.axes(x_label, y_label)
    for index, (name, points) in enumerate(drawn.items()):
        tone = f"s{index % _LINE_SERIES}"
        places = [frame.place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        end_x, end_y = places[-1]
        parts.append(
            f'<polyline class="{tone}" points="{path}"/>'
            f'<circle class="{tone}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3"/>'
            f'<text class="legend {tone}" x="{_RIGHT + 14}" y="{_TOP + 12 + index * 18}">{escape(_short(name))}</text>'
        )
    return _svg(title, _RIGHT + 170, max(_BOTTOM + 40, _TOP + 12 + len(drawn) * 18), parts)


def histogram(title: str, edges: Sequence[float], counts: Sequence[float], x_label: str, y_label: str) -> str:
    """Upright bars side by side, each over its own range of values.

    Args:
        title: for screen readers.
        edges: ascending bounds of the bars, one more than there are counts.
        counts: height of each bar, 0 or more.
        x_label: under the horizontal axis.
        y_label: over the vertical axis.
    """
    frame = _Frame(ticks(edges[0], edges[-1]), ticks(0.0, max(counts)))
    parts = frame.axes(x_label, y_label)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        left, top = frame.place(low, count)
        right, bottom = frame.place(high, 0.0)
        parts.append(
            f'<rect class="plain" x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" '
            f'height="{bottom - top:.1f}"><title>{low:g} to {high:g}: {count:,}</title></rect>'
        )
    return _svg(title, _RIGHT + 170, _BOTTOM + 40, parts)


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plotting area between the outermost ticks."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; y grows upwards in the data and downwards on the page."""
        across = (x - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        """Grid lines, tick values and labels."""
        parts = [f'<text class="label" x="4" y="14">{escape(y_label)}</text>']
        for tick in self.y_ticks:
            _, y = self.place(self.x_ticks[0], tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_RIGHT}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )
        for tick in self.x_ticks:
            x, _ = self.place(tick, self.y_ticks[0])
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{_BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
            )
        parts.append(
            f'<text class="label" x="{_RIGHT}" y="{_BOTTOM + 34}" text-anchor="end">{escape(x_label)}</text>'
        )
        return parts


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values, evenly spaced, that enclose ``low`` to ``high``; at least two."""
    span = high - low or abs(high) or 1.0
    raw = span / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def _short(label: str, limit: int = 30) -> str:
    return label if len(label) <= limit else f"{label[: limit - 1]}…"
