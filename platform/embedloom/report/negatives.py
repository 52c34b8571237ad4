"""The section "Hard negatives": what the mining rules removed, how close the kept ones are, a judge's opinion."""

from collections.abc import Mapping
from html import escape
from typing import Any

from embedloom.report.charts import histogram
from embedloom.report.markup import number_text, table_markup
from embedloom.report.summary import Stage

# Keys of mining's audit summary -> what people read.
_RULES = {
    "positive": "known positive",
    "margin": "above the margin",
    "rank": "by rank",
    "floor": "below the floor",
}
_KINDS = {"selected": "selected", "naive": "naive top candidates"}


def negatives_section(stages: list[Stage]) -> str:
    """Tables and a histogram for every artefact that recorded an audit; empty where none did, as in older runs.

    Args:
        stages: artefacts; ``details["audit"]`` of a manifest is what ``mining.audit.audit_summary`` returns and,
            below ``"judged"``, what ``mining.judge.judge_sample`` returns; ``details["scored_by"]`` names the models
            whose scores the rules read.
    """
    found = [(stage.name, stage.manifest["details"]) for stage in stages if stage.manifest]
    audited = {name: details for name, details in found if details.get("audit")}
    parts = []
    for name, details in audited.items():
        audit, scored_by = details["audit"], ", ".join(details.get("scored_by", []))
        parts += [f"<h3>{escape(name)}</h3>"] if len(audited) > 1 else []
        parts += [f"<p>Scores of {escape(scored_by)}.</p>"] if scored_by else []
        parts += [_figures(audit), _gaps(audit), _judged(audit.get("judged"))]
    return "\n".join(filter(None, parts))


def _figures(audit: Mapping[str, Any]) -> str:
    """A row a dataset and one for all of them."""
    groups = {**audit["datasets"], "all": audit["total"]} if len(audit["datasets"]) > 1 else audit["datasets"]
    header = ["dataset", "queries", "candidates", *(f"removed: {name}" for name in _RULES.values())]
    header += ["naive false negatives", "selected", "near-duplicates", f"fewer than {audit['negatives']}"]
    body = [
        [
            name,
            number_text(group["queries"]),
            number_text(group["candidates"]),
            *(_percent(group["removed"][rule]["share"]) for rule in _RULES),
            _percent(group["naive"]["share"]),
            number_text(group["selected"]),
            _percent(group["near_duplicates"]["share"]),
            _percent(group["short"]["share"]),
        ]
        for name, group in groups.items()
    ]
    return table_markup(header, body)


def _gaps(audit: Mapping[str, Any]) -> str:
    gaps = audit["total"]["gaps"]
    count = sum(gaps["counts"]) + gaps["below"] + gaps["above"]
    if not count:
        return ""
    edges = audit["gap_edges"]
    note = (
        f"Positive's score less the negative's, {count:,} selected negatives, mean {gaps['mean']:g}; "
        f"{gaps['below']:,} below {edges[0]:g}, {gaps['above']:,} at or above {edges[-1]:g}."
    )
    chart = histogram("Score gaps of the selected negatives", edges, gaps["counts"], "gap", "negatives")
    return f"<h3>Score gaps</h3>\n<p>{escape(note)}</p>\n{chart}"


def _judged(judged: Mapping[str, Any] | None) -> str:
    if not judged:
        return ""
    level = f"{judged['confidence']:.0%}"
    header = ["negatives", "judged", "false", "share", f"{level} from", f"{level} to"]
    body = [
        [
            label,
            number_text(judged[kind]["rows"]),
            number_text(judged[kind]["false"]),
            *(_percent(judged[kind][key]) for key in ("share", "low", "high")),
        ]
        for kind, label in _KINDS.items()
    ]
    title = f"False negatives according to {judged['judge']}, margin ratio {judged['margin_ratio']:g}"
    return f"<h3>{escape(title)}</h3>\n{table_markup(header, body)}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
