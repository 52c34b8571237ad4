"""``report.html``: one file without scripts or outside assets."""

import string
from html import escape
from importlib import resources
from typing import Any

from embedloom.progress import duration
from embedloom.report.charts import Bar, bar_chart, line_chart
from embedloom.report.leaderboard import leaderboard_section
from embedloom.report.lineage_graph import lineage_graph
from embedloom.report.markup import number_text, table_markup
from embedloom.report.negatives import negatives_section
from embedloom.report.summary import Curve, Stage
from embedloom.report.synthesis import synthesis_section
from embedloom.report.table import in_order, interval_text, label_of, score_rows, task_names
from embedloom.report.verdict import gate_section

_METRIC_NAMES = {
    "ndcg_at_10": "nDCG@10",
    "recall_at_100": "Recall@100",
    "mrr_at_10": "MRR@10",
    "main_score": "main score",
}
# Shown in columns of their own, or not a number for people.
_SHOWN_COUNTS = ("rows", "tokens", "rejects")


def render_page(
    summary: dict[str, Any], stages: list[Stage], curves: dict[str, Curve], scores: dict[str, Any]
) -> str:
    """The whole page.

    Args:
        summary: content of ``summary.json``.
        stages: artefacts in pipeline order.
        curves: training stage -> (step, loss) points.
        scores: content of ``scores.json``, empty before the evaluation has finished.
    """
    sections = [
        _overview(summary, stages),
        _section("Scores", _scores(summary["scores"], scores, _described_tasks(stages))),
        _section("Synthesis", synthesis_section(stages)),
        _section("Leaderboard", leaderboard_section(scores.get("ranking", {}))),
        _section("Gate", gate_section(summary["gate"])),
        _section("Hard negatives", negatives_section(stages)),
        _section("Training loss", _losses(curves)),
        _section("Stages", _stage_table(stages)),
        _section("Rejects", _rejects(stages)),
        _section("Time per stage", _times(stages)),
        _section("Lineage", _lineage(stages)),
    ]
    template = string.Template(resources.files("embedloom.report").joinpath("template.html").read_text())
    return template.substitute(
        title=escape(f"embedloom run {summary['run']}"), content="\n".join(filter(None, sections))
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def _overview(summary: dict[str, Any], stages: list[Stage]) -> str:
    finished = [stage for stage in stages if stage.manifest is not None]
    manifests = [stage.manifest for stage in finished if stage.manifest is not None]
    seconds = sum(stage.seconds or 0.0 for stage in finished)
    facts = {
        "stages finished": f"{len(finished)} of {len(stages)}",
        "time in stages": duration(seconds),
        "last change": max((manifest["created"] for manifest in manifests), default="-"),
        "profile": ", ".join(sorted({manifest["profile"] for manifest in manifests})) or "-",
        "version": ", ".join(sorted({manifest["versions"]["embedloom"] for manifest in manifests})) or "-",
        "gate": str(summary["gate"]["verdict"]).replace("_", " "),
    }
    items = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()
    )
    return f"<header><h1>{escape(summary['run'])}</h1><dl>{items}</dl></header>"


def _scores(summary_scores: dict[str, Any], content: dict[str, Any], described: dict[str, Any]) -> str:
    rows = score_rows(summary_scores)
    if not rows:
        return "<p>The evaluation has not finished.</p>"
    parts = []
    for task in task_names(summary_scores):
        bars = [
            Bar(label, by_task[task], f"{by_task[task]:.4f}", kind)
            for label, kind, by_task in rows
            if task in by_task
        ]
        parts.append(f"<h3>{escape(_task_title(task, described.get(task, {})))}</h3>")
        parts.append(bar_chart(f"Scores on {task}", bars, full=1.0) + _metric_table(task, content))
        parts.append(_prompts(content.get("prompts", {}).get(task, {})))
    return "\n".join(parts)


def _described_tasks(stages: list[Stage]) -> dict[str, Any]:
    """What the evaluation recorded about its tasks, by name."""
    details = [stage.manifest["details"] for stage in stages if stage.name == "evaluation" and stage.manifest]
    return dict(details[0].get("tasks", {})) if details else {}


def _task_title(task: str, described: dict[str, Any]) -> str:
    """``heldout: nDCG@10, 1,200 queries, 1,500 documents``; what is not known is left out."""
    facts = [_METRIC_NAMES.get(described["metric"], described["metric"])] if "metric" in described else []
    facts += [f"{described[key]:,} {key}" for key in ("queries", "documents") if key in described]
    return f"{task}: {', '.join(facts)}" if facts else task


def _prompts(by_model: dict[str, Any]) -> str:
    """What stood before the queries of a task, model by model; models with the same prompts share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for model, entry in by_model.items():
        sent = " | ".join(entry["sent"])
        usual = entry["sent"] == [entry["default"]]
        whose = (
            "what the endpoint sends by default"
            if usual
            else f"{entry['of']}; the endpoint's default is {entry['default']}"
        )
        rows.setdefault((sent, whose), []).append(model)
    body = [[", ".join(models), *texts] for texts, models in rows.items()]
    return table_markup(["model", "queries as scored", "whose prompt"], body, words=(0, 1, 2)) if body else ""


def _metric_table(task: str, content: dict[str, Any]) -> str:
    """All shown metrics of one task, a row a model."""
    by_model = []
    for group in ("models", "baselines"):
        values_of = content.get("metrics", {}).get(group, {})
        names = in_order(values_of, content, group)
        by_model += [(name, values_of[name][task]) for name in names if task in values_of[name]]
    metrics = [metric for metric in _METRIC_NAMES if any(metric in values for _, values in by_model)]
    if "ndcg_at_10" in metrics:
        metrics.remove("main_score")  # the main score of a retrieval task is its nDCG@10
    header = ["model", *(_METRIC_NAMES[metric] for metric in metrics), "95 % interval"]
    body = [
        [
            label_of(name, content),
            *(f"{values[metric]:.5f}" if metric in values else "" for metric in metrics),
            interval_text(content, name, task),
        ]
        for name, values in by_model
    ]
    return table_markup(header, body) if body else ""


def _losses(curves: dict[str, Curve]) -> str:
    """One chart per training stage name, one line a candidate."""
    by_stage: dict[str, dict[str, Curve]] = {}
    for name, points in curves.items():
        _, candidate, stage = name.split("/", 2)
        if points:
            by_stage.setdefault(stage, {})[candidate] = points
    return "\n".join(
        f"<h3>{escape(stage)}</h3>{line_chart(f'Loss of {stage}', lines, 'step', 'loss')}"
        for stage, lines in by_stage.items()
    )


def _stage_table(stages: list[Stage]) -> str:
    body = []
    for stage in stages:
        counts = stage.counts
        more = ", ".join(
            f"{key.replace('_', ' ')} {number_text(value)}"
            for key, value in counts.items()
            if key not in _SHOWN_COUNTS and not isinstance(value, dict)
        )
        time = "" if stage.seconds is None else duration(stage.seconds)
        body.append(
            [
                stage.name,
                stage.state,
                number_text(counts.get("rows")),
                number_text(counts.get("tokens")),
                time,
                more,
            ]
        )
    return table_markup(["stage", "state", "rows", "tokens", "time", "more"], body, words=(0, 1, 5))


def _rejects(stages: list[Stage]) -> str:
    body = []
    for stage in stages:
        rejects = stage.counts.get("rejects")
        if isinstance(rejects, dict):
            body += [
                [stage.name, str(reason), number_text(count)] for reason, count in sorted(rejects.items())
            ]
    return table_markup(["stage", "reason", "rows"], body, words=(0, 1)) if body else ""


def _times(stages: list[Stage]) -> str:
    bars = [
        Bar(stage.name, stage.seconds, duration(stage.seconds))
        for stage in stages
        if stage.seconds is not None
    ]
    return bar_chart("Time per stage", bars) if bars else ""


def _lineage(stages: list[Stage]) -> str:
    body = []
    for stage in stages:
        mark = stage.manifest["fingerprint"] if stage.manifest else "unfinished"
        made_from = ", ".join(f"{name} {value}" for name, value in stage.inputs.items())
        body.append([stage.name, mark, made_from or "-"])
    table = table_markup(["artefact", "fingerprint", "made from"], body, words=(0, 1, 2))
    return f'<div class="scroll">{lineage_graph(stages)}</div>\n{table}'
