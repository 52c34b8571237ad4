"""The leaderboard as a table for the terminal, a section of the report and a page of its own."""

import string
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from embedloom.report.charts import Bar, bar_chart
from embedloom.report.markup import table_markup
from embedloom.report.table import text_table

Row = Mapping[str, Any]  # model, own, rank, votes, mean_task, mean_type, types
_SHORT_TYPES = {
    "BitextMining": "Bitext", "Classification": "Class.", "Clustering": "Clust.", "InstructionReranking": "InstrRer.",
    "MultilabelClassification": "Multilabel", "PairClassification": "PairCl.", "Reranking": "Rerank.",
    "Retrieval": "Retr.",
}  # fmt: skip


def leaderboard_table(rows: Sequence[Row], about: str) -> str:
    """Plain text, our own models marked; a gap in the ranks is a line of its own."""
    kinds = sorted(rows[0]["types"]) if rows else []
    short = (_SHORT_TYPES.get(kind, kind) for kind in kinds)
    body: list[list[str]] = []
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        if before is not None and row["rank"] > before["rank"] + _tied(rows, before):
            body.append(["...", *[""] * (4 + len(kinds))])
        body.append(_cells(row, kinds))
    header = ["rank", "model", "Borda", "Mean(Task)", "Mean(Type)", *short]
    return "\n".join([about, *text_table(header, body, (1,))])


def _tied(rows: Sequence[Row], row: Row) -> int:
    return sum(other["rank"] == row["rank"] for other in rows)


def _cells(row: Row, kinds: Sequence[str]) -> list[str]:
    mark = "> " if row["own"] else ""
    means = [row["mean_task"], row["mean_type"], *(row["types"].get(kind) for kind in kinds)]
    return [str(row["rank"]), f"{mark}{row['model']}", f"{row['votes']:g}", *map(_percent, means)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def leaderboard_section(ranking: Mapping[str, Any]) -> str:
    """Chart and table of ``ranking`` in ``scores.json``; empty in runs from before it was there."""
    rows = ranking.get("shown", [])
    if not rows:
        return ""
    pool = str(ranking["pool"])
    mark = f" ({ranking['pool_fingerprint']})" if ranking.get("pool_fingerprint") else ""
    about = f"Borda votes among {ranking['pool_models']} models on {len(ranking['tasks'])} tasks; pool: {pool}{mark}."
    return f"<p>{escape(about)}</p>\n{leaderboard_markup(rows)}"


def leaderboard_markup(rows: Sequence[Row]) -> str:
    """Bars of the votes and all columns, as HTML."""
    bars = [
        Bar(
            f"{row['rank']}. {row['model']}",
            row["votes"],
            f"{row['votes']:g}",
            "merged" if row["own"] else "baseline",
        )
        for row in rows
    ]
    kinds = sorted(rows[0]["types"])
    header = ["rank", "model", "Borda votes", "Mean (Task)", "Mean (TaskType)", *kinds]
    body = [_cells(row, kinds) for row in rows]
    return bar_chart("Borda votes", bars) + table_markup(header, body, words=(1,))


def leaderboard_page(rows: Sequence[Row], about: str) -> str:
    """One HTML file without scripts or outside assets."""
    template = string.Template(resources.files("embedloom.report").joinpath("template.html").read_text())
    content = f"<header><h1>Leaderboard</h1></header><section><p>{escape(about)}</p>\n{leaderboard_markup(rows)}</section>"
    return template.substitute(title="embedloom leaderboard", content=content)
