"""cluster/grafana_dashboard.json: every metric it draws is one that somebody exports."""

import json
import re
from pathlib import Path

import ray

from embedloom.serving.batches import runner
from embedloom.serving.metrics import EndpointMetrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "cluster/grafana_dashboard.json").read_text())
OURS_BY_RAY = "ray_embedloom_"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def drawn() -> set[str]:
    """Names of metrics in the panels' queries."""
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 20
    # A name is what a selector or a range follows, or what stands alone in a function; never a function or a label.
    names = {name for query in queries for name in re.findall(r"\b[a-z][a-z0-9_]{6,}(?=[\[{)])", query)}
    return names - {"operator", "deployment", "instance", "replica", "dataset", "gateway", "outcome"}


def exported() -> set[str]:
    metrics = EndpointMetrics()
    metrics.watch_queue(lambda: {"query": 0, "bulk": 0})
    return {
        f"{family.name}{suffix}"
        for family in metrics.registry.collect()
        for suffix in SUFFIXES.get(family.type, ())
    }


def test_our_metrics_in_the_dashboard_are_exported():
    ours = {name for name in drawn() if not name.startswith("ray_")}
    assert ours
    assert ours - exported() == set()


def test_our_metrics_that_ray_exports_are_made_where_batches_are_run():
    made = set(re.findall(r'"(embedloom_\w+)"', Path(runner.__file__).read_text()))
    ours = {
        name.removeprefix("ray_").removesuffix("_total") for name in drawn() if name.startswith(OURS_BY_RAY)
    }
    assert ours == made and len(made) == 3


def test_rays_metrics_in_the_dashboard_are_rays():
    root = Path(ray.__file__).parent
    # Ray's own dashboards, and the two places that define what they do not draw.
    sources = [
        *(root / "dashboard/modules/metrics/dashboards").glob("*.py"),
        root / "serve/_private/deployment_state.py",
    ]
    text = "".join(path.read_text() for path in sources)
    rays = {name for name in drawn() if name.startswith("ray_") and not name.startswith(OURS_BY_RAY)}
    assert len(rays) > 8
    assert {name for name in rays if not re.search(rf"\b(ray_)?{name.removeprefix('ray_')}\b", text)} == set()


def test_the_dashboard_loads_in_grafana_as_it_is():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["title"] for panel in DASHBOARD["panels"])
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"
