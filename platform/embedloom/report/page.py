"""``report.html`` of a run: one file without scripts or outside assets, section by section, and ``summary.json`` beside it."""

import string
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from embedloom.config.reranker import MODEL_NODE
from embedloom.core.progress import duration
from embedloom.core.storage import Place
from embedloom.report.charts import (
    Bar,
    bar_chart,
    histogram,
    line_chart,
    number_text,
    percent_text,
    table_markup,
)
from embedloom.report.leaderboard import leaderboard_section
from embedloom.report.summary import (
    Curve,
    Stage,
    build_summary,
    in_order,
    interval_text,
    label_of,
    loss_curve,
    read_score_file,
    read_stages,
    score_rows,
    task_names,
)
from embedloom.report.synthesis import synthesis_section

# The section "Gate": the verdict, its rules and the differences on every task.


def gate_section(gate: Mapping[str, Any]) -> str:
    """Tables of a verdict; empty where the gate has not run."""
    if "checks" not in gate:
        return ""
    title = f"{gate['candidate']} against {gate['against']}: {gate['verdict']}"
    checks = [
        ["ok" if check["passed"] else "refused", check["name"], check["text"]] for check in gate["checks"]
    ]
    tasks = [
        [
            task,
            f"{entry['current']:.4f}",
            f"{entry['candidate']:.4f}",
            f"{entry['difference']:+.4f}",
            "" if entry["low"] is None else f"{entry['low']:+.4f} to {entry['high']:+.4f}",
            "" if entry["p_worse"] is None else f"{entry['p_worse']:.4f}",
            entry["result"],
        ]
        for task, entry in gate["tasks"].items()
    ]
    header = ["task", "current", "candidate", "difference", "95 % interval", "p of a loss (Holm)", "result"]
    rules = table_markup(["", "rule", "seen and required"], checks, words=(0, 1, 2))
    return f"<h3>{escape(title)}</h3>\n{rules}\n{table_markup(header, tasks, words=(0, 6))}"


# The section "Hard negatives": what the mining rules removed, how close the kept ones are, a judge's opinion.


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
            *(percent_text(group["removed"][rule]["share"]) for rule in _RULES),
            percent_text(group["naive"]["share"]),
            number_text(group["selected"]),
            percent_text(group["near_duplicates"]["share"]),
            percent_text(group["short"]["share"]),
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
            *(percent_text(judged[kind][key]) for key in ("share", "low", "high")),
        ]
        for kind, label in _KINDS.items()
    ]
    title = f"False negatives according to {judged['judge']}, margin ratio {judged['margin_ratio']:g}"
    return f"<h3>{escape(title)}</h3>\n{table_markup(header, body)}"


# The artefacts of a run as a graph: columns by how far from the corpus, lines from what was made to what it was made from.


_WIDTH, _HEIGHT = 168, 40  # of a box, in pixels
_ACROSS, _DOWN = 46, 14  # between boxes
_SHOWN = 8  # digits of a fingerprint


def lineage_graph(stages: list[Stage]) -> str:
    """An inline SVG; inputs that were rebuilt since are drawn dashed."""
    columns = _columns(stages)
    place = {
        stage.name: (column * (_WIDTH + _ACROSS), row * (_HEIGHT + _DOWN))
        for column, found in enumerate(columns)
        for row, stage in enumerate(found)
    }
    width = len(columns) * (_WIDTH + _ACROSS) - _ACROSS
    height = max(len(found) for found in columns) * (_HEIGHT + _DOWN) - _DOWN
    title = "Artefacts and what they were made from"
    parts = [*_edges(stages, place), *(_box(stage, *place[stage.name]) for stage in stages)]
    return (
        f'<svg viewBox="-1 -1 {width + 2} {height + 2}" width="{width + 2}" height="{height + 2}" role="img" '
        f'aria-label="{title}"><title>{title}</title>{"".join(parts)}</svg>'
    )


def _columns(stages: list[Stage]) -> list[list[Stage]]:
    """Stages by the longest way to an artefact without inputs."""
    by_name = {stage.name: stage for stage in stages}
    depth: dict[str, int] = {}
    for stage in stages:  # pipeline order: inputs come first
        depth[stage.name] = max(
            (depth.get(name, -1) + 1 for name in stage.inputs if name in by_name), default=0
        )
    columns: list[list[Stage]] = [[] for _ in range(max(depth.values()) + 1)]
    for stage in stages:
        columns[depth[stage.name]].append(stage)
    return [column for column in columns if column]


def _edges(stages: list[Stage], place: dict[str, tuple[int, int]]) -> list[str]:
    now = {stage.name: stage.manifest["fingerprint"] for stage in stages if stage.manifest}
    lines = []
    for stage in stages:
        x, y = place[stage.name]
        for name, recorded in stage.inputs.items():
            if name in place:
                from_x, from_y = place[name]
                start, end = (from_x + _WIDTH, from_y + _HEIGHT // 2), (x, y + _HEIGHT // 2)
                middle = end[0] - _ACROSS // 2
                dashed = "" if now.get(name) == recorded else ' stroke-dasharray="4 3"'
                lines.append(
                    f'<path class="edge" d="M{start[0]} {start[1]} C{middle} {start[1]} {middle} {end[1]} {end[0]} {end[1]}"'
                    f"{dashed}><title>{escape(stage.name)} was made from {escape(name)}</title></path>"
                )
    return lines


def _box(stage: Stage, x: int, y: int) -> str:
    mark = stage.manifest["fingerprint"][:_SHOWN] if stage.manifest else "unfinished"
    name = stage.name.removeprefix("training/")
    return (
        f'<rect class="node" x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="4"/>'
        f'<text x="{x + 8}" y="{y + 17}">{escape(name)}</text>'
        f'<text class="tick" x="{x + 8}" y="{y + 33}">{escape(mark)}</text>'
    )


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
        _section("Reranker", gate_section(summary.get("reranker", {}))),
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
        # training/CANDIDATE/STAGE; the reranker has one run of one stage: reranker/model.
        kind, candidate, *stages = name.split("/", 2)
        stage = stages[0] if stages else kind
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


SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"


def write_report(run_place: Place) -> str:
    """Write both files from the manifests of a run, finished or not.

    Args:
        run_place: the run folder, ``runs/<name>``.

    Returns:
        Where the report is.

    Raises:
        DataError: no artefact there, or a corrupt manifest.
    """
    stages = read_stages(run_place)
    summary = build_summary(run_place, stages)
    curves = {
        stage.name: loss_curve(stage) for stage in stages if stage.name.startswith(("training/", MODEL_NODE))
    }
    run_place.write_json(SUMMARY_FILE, summary)
    run_place.write_bytes(REPORT_FILE, render_page(summary, stages, curves, read_score_file(stages)).encode())
    return f"{run_place.uri.rstrip('/')}/{REPORT_FILE}"
