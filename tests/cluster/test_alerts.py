"""cluster/alerts.yaml: every metric is one that somebody exports, and every alert is explained."""

import re
from pathlib import Path

import pytest
import ray
import yaml

from embedloom.serving.metrics import EndpointMetrics

ROOT = Path(__file__).parents[2]
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "cluster/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
NAMES = [rule["alert"] for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_has_what_prometheus_reads_and_metrics_that_there_are(rule):
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[mh]", rule["for"]) and rule["labels"]["severity"] in ("page", "ticket")
    used = set(re.findall(r"\b(?:embedloom|ray_serve)_[a-z_]+\b", rule["expr"]))
    ours = {
        f"{family.name}{suffix}": set(family.samples[0].labels) if family.samples else set()
        for family in EndpointMetrics().registry.collect()
        for suffix in SUFFIXES.get(family.type, ())
    }
    rays = "".join(path.read_text() for path in (Path(ray.__file__).parent / "serve/_private").glob("*.py"))
    for name in used:
        assert name in ours or f'"{name.removeprefix("ray_")}"' in rays, name
    assert used or rule["expr"].startswith("up{")
    for opening, closing in ("()", "[]", "{}"):
        assert rule["expr"].count(opening) == rule["expr"].count(closing)


def test_the_runbook_explains_every_alert_and_no_other():
    page = (ROOT / "docs/how-to/alerts.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == NAMES
