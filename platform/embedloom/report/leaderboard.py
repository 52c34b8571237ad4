"""The leaderboard, and the table of an ablation: on the terminal, as a section of the report, as a page of its own."""

import string
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from embedloom.core.tables import text_table
from embedloom.report.charts import Bar, bar_chart, table_markup

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


_HEADER = ("variant", "seeds", "mean", "95 % interval", "less the first", "95 % interval of that")


def ablation_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of each variant, as ``ablation.json`` has them."""
    rows: list[tuple[str, ...]] = []
    for variant in result["variants"]:
        scores = variant["scores"]
        done = f"{len(scores)} of {len(result['seeds'])}"
        if not scores:
            rows.append((variant["name"], done, "-", "-", "-", "-"))
            continue
        difference = variant["difference"]
        rows.append(
            (
                variant["name"],
                done,
                f"{variant['mean']:.4f}",
                _interval(variant["interval"], ""),
                "-" if difference is None else f"{difference['mean']:+.4f}",
                "-" if difference is None else _interval(difference["interval"], "+"),
            )
        )
    return rows


def ablation_table(result: dict[str, Any]) -> str:
    """A Markdown table, with a line of what was measured above it."""
    return "\n".join([_measured(result), "", *text_table(_HEADER, ablation_rows(result))])


def ablation_page(result: dict[str, Any]) -> str:
    """``report.html`` of an ablation."""
    settings = [
        (variant["name"], ", ".join(f"{key} = {value}" for key, value in variant["set"].items()))
        for variant in result["variants"]
    ]
    content = [
        f"<header><h1>{escape(result['name'])}</h1><p>{escape(result['description'])}</p>"
        f"<p>{escape(_measured(result))}</p></header>",
        f"<section><h2>Scores</h2>{table_markup(_HEADER, ablation_rows(result))}</section>",
        f"<section><h2>Variants</h2>{table_markup(('variant', 'differs in'), settings, (0, 1))}</section>",
    ]
    template = string.Template(resources.files("embedloom.report").joinpath("template.html").read_text())
    return template.substitute(
        title=escape(f"embedloom ablation {result['name']}"), content="\n".join(content)
    )


def _measured(result: dict[str, Any]) -> str:
    task = result["task"] or "the mean over all tasks"
    return (
        f"{result['metric']} of {result['model']} on {task}, seeds {', '.join(map(str, result['seeds']))}; "
        "t intervals over seeds, differences seed by seed"
    )


def _interval(bounds: list[float] | None, sign: str) -> str:
    return "-" if bounds is None else f"{bounds[0]:{sign}.4f} to {bounds[1]:{sign}.4f}"
