"""The section "Gate": the verdict, its rules and the differences on every task."""

from collections.abc import Mapping
from html import escape
from typing import Any

from embedloom.report.markup import table_markup


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
