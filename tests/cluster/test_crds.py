"""Rendered resources against a definition (``cluster/render.py``); a small one by hand, KubeRay's own where they are."""

from pathlib import Path

import pytest
import yaml

from embedloom.cluster.manifests import documents
from embedloom.cluster.render import check, check_custom_resource, read_crds
from embedloom.config.cluster import load_cluster
from embedloom.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCHEMA = {
    "type": "object",
    "properties": {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["rayVersion"],
            "properties": {
                "rayVersion": {"type": "string"},
                "groups": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "minReplicas": {"type": "integer", "nullable": True},
                            "properties": {"type": "string"},  # a key that reads like a schema's own
                            "limits": {
                                "type": "object",
                                "additionalProperties": {
                                    "anyOf": [{"type": "integer"}, {"type": "string"}],
                                    "x-kubernetes-int-or-string": True,
                                },
                            },
                            "template": {
                                "type": "object",
                                "properties": {"a": {"type": "string"}},
                                "x-kubernetes-preserve-unknown-fields": True,
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture
def folder(tmp_path):
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "spec": {
            "group": "ray.io",
            "names": {"kind": "RayCluster"},
            "versions": [
                {"name": "v1", "served": True, "schema": {"openAPIV3Schema": SCHEMA}},
                {"name": "v1alpha1", "served": False, "schema": {"openAPIV3Schema": {}}},
            ],
        },
    }
    (tmp_path / "other.yaml").write_text("kind: Kustomization\n")
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump_all([None, definition]))
    return tmp_path


def cluster(**spec):
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "x"},
        "spec": {"rayVersion": "2", **spec},
    }


def test_a_resource_that_fits_is_accepted(folder):
    schemas = read_crds(folder)
    assert set(schemas) == {("ray.io/v1", "RayCluster")}
    group = {
        "minReplicas": None,
        "properties": "p",
        "limits": {"cpu": "4", "nvidia.com/gpu": 1},
        "template": {"b": 1},
    }
    line = check_custom_resource(cluster(groups=[group]), schemas, "f.yaml")
    assert line == "valid for the definition of ray.io/v1 RayCluster"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"group": []}, r"f\.yaml: spec\.group: unknown key; the nearest valid key is 'groups'"),
        (
            {"groups": [{"minReplica": 1}]},
            r"f\.yaml: spec\.groups\.0\.minReplica: unknown key; the nearest valid key is 'minReplicas'",
        ),
        (
            {"groups": [{"minReplicas": "one"}]},
            r"f\.yaml: spec\.groups\.0\.minReplicas: 'one' is not of type",
        ),
        ({"rayVersion": 2}, r"f\.yaml: spec\.rayVersion: 2 is not of type 'string'"),
    ],
)
def test_what_the_definition_refuses_is_named(folder, spec, message):
    with pytest.raises(ConfigError, match=message):
        check_custom_resource(cluster(**spec), read_crds(folder), "f.yaml")


def test_a_folder_without_definitions_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        read_crds(tmp_path / "absent")
    (folder / "clusters.yaml").unlink()
    with pytest.raises(ConfigError, match="no CustomResourceDefinition in its YAML files"):
        read_crds(folder)


def test_check_says_which_kind_has_no_definition(folder):
    with pytest.raises(ConfigError, match=r"raycluster\.yaml: spec\..*: unknown key"):
        check(load_cluster(ROOT / "cluster/cluster.yaml"), "a100x64", project=ROOT, crds=folder)
    content = documents(load_cluster(ROOT / "cluster/cluster.yaml"), "a100x64")["rayjob.yaml"]
    with pytest.raises(
        ConfigError, match=r"no definition of ray\.io/v1 RayJob .*found: ray\.io/v1 RayCluster"
    ):
        check_custom_resource(content, read_crds(folder), "rayjob.yaml")


def test_shipped_profiles_fit_kuberays_own_definitions(kuberay_crds):
    config = load_cluster(ROOT / "cluster/cluster.yaml")
    for name, profile in config.profiles.items():
        if profile.pools:
            check(config, name, project=ROOT, crds=kuberay_crds)
