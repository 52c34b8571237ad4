"""An ablation's scores for people: one table, on the terminal and as a page."""

import string
from html import escape
from importlib import resources
from typing import Any

from embedloom.report.markup import table_markup
from embedloom.report.table import text_table

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
