"""The section "Synthesis": who wrote how much of what, what was refused and why, how varied the rows are."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from embedloom.core.tables import text_table
from embedloom.report.charts import Bar, bar_chart, number_text, percent_text, table_markup
from embedloom.report.summary import Stage

Cell = Mapping[str, Any]
_NO_GENERATOR = "none (extracted)"


def synthesis_section(stages: list[Stage]) -> str:
    """Tables and charts of the synthesis artefact; empty where none recorded its cells, as in older runs.

    Args:
        stages: artefacts; ``details["cells"]`` of a manifest holds one entry a generator, family and language,
            ``details["engines"]`` the speed of each generator, ``details["diversity"]`` what
            ``synthesis.diversity.measure`` returns.
    """
    found = [stage.manifest["details"] for stage in stages if stage.manifest is not None]
    parts = []
    for details in found:
        if details.get("cells"):
            parts += [
                _by_generator(details["cells"], details.get("engines", {})),
                _by("family", details["cells"]),
                _by("language", details["cells"]),
                _rejects(details["cells"]),
                _diversity(details.get("diversity") or {}),
            ]
    return "\n".join(filter(None, parts))


def synthesis_lines(details: Mapping[str, Any]) -> list[str]:
    """The same figures as text for the terminal: a row a generator, family and language."""
    header = ("generator", "family", "language", "rows", "quota", "refused", "output tokens")
    body = [
        (
            _generator(cell),
            str(cell["family"]),
            str(cell["language"]),
            number_text(cell["rows"]),
            number_text(cell["quota"]),
            percent_text(_refused([cell])),
            number_text(cell["output_tokens"]),
        )
        for cell in details.get("cells", [])
    ]
    return text_table(header, body, (0, 1, 2), style=None) if body else []


def _by_generator(cells: Sequence[Cell], engines: Mapping[str, Any]) -> str:
    groups = _grouped(cells, _generator)
    total = sum(cell["rows"] for cell in cells) or 1
    header = [
        "generator",
        "rows",
        "share",
        "attempts",
        "refused",
        "prompt tokens",
        "output tokens",
        "output tokens/s",
    ]
    body = [
        [
            name,
            number_text(_sum(group, "rows")),
            percent_text(_sum(group, "rows") / total),
            number_text(_sum(group, "attempts")),
            percent_text(_refused(group)),
            number_text(_sum(group, "prompt_tokens")),
            number_text(_sum(group, "output_tokens")),
            number_text(_rounded(engines.get(name, {}).get("tokens_per_second"))) or "-",
        ]
        for name, group in groups.items()
    ]
    bars = [
        Bar(name, rows, number_text(rows)) for name, group in groups.items() for rows in [_sum(group, "rows")]
    ]
    chart = bar_chart("Rows per generator", bars) if len(bars) > 1 else ""
    return f"<h3>Generators</h3>\n{table_markup(header, body)}\n{chart}"


def _by(key: str, cells: Sequence[Cell]) -> str:
    groups = _grouped(cells, lambda cell: str(cell[key]))
    header = [key, "rows", "quota", "attempts", "refused", "output tokens", "tokens a row"]
    body = [
        [
            name,
            number_text(_sum(group, "rows")),
            number_text(_sum(group, "quota")),
            number_text(_sum(group, "attempts")),
            percent_text(_refused(group)),
            number_text(_sum(group, "output_tokens")),
            number_text(_rounded(_sum(group, "output_tokens") / _sum(group, "rows")))
            if _sum(group, "rows")
            else "-",
        ]
        for name, group in groups.items()
    ]
    title = {"family": "Families", "language": "Languages"}[key]
    bars = [
        Bar(name, _sum(group, "rows"), number_text(_sum(group, "rows"))) for name, group in groups.items()
    ]
    chart = bar_chart(f"Rows per {key}", bars) if len(bars) > 1 else ""
    return f"<h3>{title}</h3>\n{table_markup(header, body)}\n{chart}"


def _rejects(cells: Sequence[Cell]) -> str:
    """A row a reason, a column a generator, as shares of the rows asked for."""
    groups = _grouped(cells, _generator)
    reasons: Counter[str] = Counter()
    for cell in cells:
        reasons.update(cell["rejects"])
    if not reasons:
        return ""
    asked = {name: _sum(group, "asked") for name, group in groups.items()}
    body = [
        [
            reason,
            number_text(count),
            *(
                percent_text(
                    sum(cell["rejects"].get(reason, 0) for cell in group) / asked[name]
                    if asked[name]
                    else None
                )
                for name, group in groups.items()
            ),
        ]
        for reason, count in reasons.most_common()
    ]
    bars = [Bar(reason, count, number_text(count)) for reason, count in reasons.most_common()]
    table = table_markup(["reason", "rows", *(f"of {name}" for name in groups)], body)
    return f"<h3>Refused</h3>\n{table}\n{bar_chart('Refused rows by reason', bars)}"


def _diversity(measured: Mapping[str, Any]) -> str:
    if not measured:
        return ""
    sample = measured["sample"]
    header = ["generator", "sampled rows", "distinct-1", "distinct-2", "distinct-3"]
    body = [
        [
            name,
            number_text(sample.get(name, sum(sample.values()))),
            *(number_text(values.get(size)) or "-" for size in ("1", "2", "3")),
        ]
        for name, values in measured["distinct"].items()
    ]
    parts = ["<h3>Diversity</h3>", table_markup(header, body)]
    notes = []
    if measured.get("mean_cosine") is not None:
        notes.append(f"Mean cosine of two queries under the teacher: {measured['mean_cosine']:.4f}.")
    if measured.get("coverage"):
        covered = measured["coverage"]
        notes.append(
            f"Seed documents lie in {covered['hit']:,} of {covered['clusters']:,} clusters of the corpus "
            f"({covered['share']:.1%}; {covered['documents']:,} documents sampled)."
        )
    parts += [f"<p>{escape(' '.join(notes))}</p>"] if notes else []
    if measured["overlap"]:
        pairs = [[one["left"], one["right"], f"{one['jaccard']:.4f}"] for one in measured["overlap"]]
        parts.append(table_markup(["generator", "and", "shared word 3-grams (Jaccard)"], pairs, words=(0, 1)))
    return "\n".join(parts)


def _grouped(cells: Iterable[Cell], key: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _generator(cell: Cell) -> str:
    return str(cell["generator"]) or _NO_GENERATOR


def _sum(cells: Iterable[Cell], key: str) -> int:
    return sum(int(cell[key]) for cell in cells)


def _refused(cells: Sequence[Cell]) -> float | None:
    """Share of the rows asked for that were refused."""
    asked = _sum(cells, "asked")
    return sum(sum(cell["rejects"].values()) for cell in cells) / asked if asked else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
