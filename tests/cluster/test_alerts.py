"""cluster/alerts.yaml: every metric is one that somebody exports, and every alert is explained."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml

from embedloom.serving.batches import runner
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
    used = set(re.findall(r"\b(?:embedloom|ray_embedloom|ray_serve)_[a-z_]+\b", rule["expr"]))
    ours = {
        f"{family.name}{suffix}": set(family.samples[0].labels) if family.samples else set()
        for family in EndpointMetrics().registry.collect()
        for suffix in SUFFIXES.get(family.type, ())
    }
    rays = "".join(path.read_text() for path in (Path(ray.__file__).parent / "serve/_private").glob("*.py"))
    by_ray = {
        f"ray_{name}{suffix}"
        for name in re.findall(r'"(embedloom_\w+)"', Path(runner.__file__).read_text())
        for suffix in ("", "_total")
    }
    for name in used:
        assert name in ours or name in by_ray or f'"{name.removeprefix("ray_")}"' in rays, name
    assert used or rule["expr"].startswith("up{")
    for opening, closing in ("()", "[]", "{}"):
        assert rule["expr"].count(opening) == rule["expr"].count(closing)


BATCHES = """
rule_files: [RULES]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'ray_embedloom_batches_ended_total{status="failed"}', values: '_x80 1x110'}
      - {series: 'ray_embedloom_batches_ended_total{status="expired"}', values: '2x170 3x20'}
      - {series: 'ray_embedloom_batches_ended_total{status="completed"}', values: '0+1x190'}
    alert_rule_test:
      - {eval_time: 65m, alertname: BatchesFail, exp_alerts: []}
      - {eval_time: 85m, alertname: BatchesFail, exp_alerts: [{exp_labels: {severity: ticket, status: failed}, exp_annotations: SAID}]}
      - {eval_time: 165m, alertname: BatchesFail, exp_alerts: []}
      - {eval_time: 180m, alertname: BatchesFail, exp_alerts: [{exp_labels: {severity: ticket, status: expired}, exp_annotations: SAID}]}
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_a_batch_that_fails_is_told_for_an_hour_be_it_the_first_or_another(tmp_path):
    rules = ROOT / "cluster/alerts.yaml"
    said = '{summary: "batches failed, or were not done within their day"}'
    (tmp_path / "test.yml").write_text(BATCHES.replace("RULES", str(rules)).replace("SAID", said))
    for command in (["check", "rules", str(rules)], ["test", "rules", str(tmp_path / "test.yml")]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_runbook_explains_every_alert_and_no_other():
    page = (ROOT / "docs/how-to/alerts.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == NAMES
