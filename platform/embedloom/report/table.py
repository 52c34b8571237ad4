"""The scores of a run as text for the terminal."""

import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any

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


def score_rows(scores: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """(label, kind, score by task) of base, candidates, merged model and baselines, in that order.

    ``kind`` is base, candidate, merged or baseline.
    """
    rows = [("base", "base", scores.get("base", {}))]
    candidates = in_order(scores.get("candidates", {}), scores, "models")
    rows += [(name, "candidate", scores["candidates"][name]) for name in candidates]
    rows.append(("merged", "merged", scores.get("merged", {})))
    for name in in_order(scores.get("baselines", {}), scores, "baselines"):
        rows.append((label_of(name, scores), "baseline", scores["baselines"][name]))
    return [row for row in rows if row[2]]


def label_of(name: str, scores: dict[str, Any]) -> str:
    """A model's name in ``scores.json``, for people: the teacher with the model it is."""
    return f"teacher {scores['teacher']}" if name == "teacher" and "teacher" in scores else name


def task_names(scores: dict[str, Any]) -> list[str]:
    """All tasks in the order of the config."""
    return in_order({task for _, _, by_task in score_rows(scores) for task in by_task}, scores, "tasks")


def in_order(names: Iterable[str], scores: dict[str, Any], kind: str) -> list[str]:
    """Names of ``models``, ``baselines`` or ``tasks`` as the evaluation recorded them, then any others by name."""
    order = scores.get("order", {}).get(kind, [])
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def interval_text(scores: dict[str, Any], name: str, task: str) -> str:
    """``0.3912 to 0.4311``, the bootstrap interval of a score; empty where there is none."""
    for group in scores.get("intervals", {}).values():
        if task in group.get(name, {}):
            low, high = group[name][task]
            return f"{low:.4f} to {high:.4f}"
    return ""


def _prompt_lines(prompts: dict[str, Any]) -> list[str]:
    """A line for every task that was not scored as the endpoint asks by default."""
    other = {
        task: entry["of"]
        for task, by_model in prompts.items()
        for entry in by_model.values()
        if entry["sent"] != [entry["default"]]
    }
    return [f"prompts of {task}: {of}, not what the endpoint sends by default" for task, of in other.items()]


def summary_table(summary: dict[str, Any]) -> str:
    """Scores of base, candidates, merged model and baselines, one column a task; plain ASCII."""
    rows = score_rows(summary["scores"])
    if not rows:
        return "no scores yet: the evaluation has not finished"
    tasks = task_names(summary["scores"])
    single = len(tasks) == 1  # an interval beside each of many scores would hide the scores
    header = ["model", "kind", *tasks, *(["95 % interval"] if single else [])]
    body = []
    for label, kind, by_task in rows:
        cells = [f"{by_task[task]:.5f}" if task in by_task else "-" for task in tasks]
        name = "teacher" if label.startswith("teacher ") and kind == "baseline" else label
        body.append(
            [label, kind, *cells, *([interval_text(summary["scores"], name, tasks[0])] if single else [])]
        )
    lines = text_table(header, body, (0, 1))
    lines += _prompt_lines(summary["scores"].get("prompts", {}))
    gate = summary.get("gate", {})
    if "checks" in gate:
        lines.append(
            f"gate: {gate['candidate']} against {gate['against']}: {gate['verdict']}: {'; '.join(gate['reasons'])}"
        )
    return "\n".join(lines)
