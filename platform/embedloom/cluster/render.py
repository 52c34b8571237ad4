"""``embedloom cluster render`` and ``check``: write a profile's files, and try them on what reads them."""

import json
from pathlib import Path
from typing import Any

import yaml

from embedloom.cluster.config import ClusterConfig
from embedloom.cluster.crds import check_custom_resource, read_crds
from embedloom.cluster.documents import documents
from embedloom.cluster.validation import check_document, check_runtime_env, check_serve_config
from embedloom.config.base import read_yaml
from embedloom.config.serving import ServingConfig

SHIPPED_SERVE_CONFIG = Path("serve/config.yaml")
SHIPPED_RUNTIME_ENV = Path("cluster/runtime_env.yaml")


def render(cluster: ClusterConfig, profile_name: str, out_dir: Path) -> list[Path]:
    """Write the files of one profile and return their paths.

    Raises:
        ConfigError: no such profile, or one that does not make a valid file.
    """
    files = documents(cluster, profile_name)
    for name, content in files.items():
        check_document(name, content)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in files.items():
        path = out_dir / name
        path.write_text(file_text(name, content, profile_name))
        paths.append(path)
    return paths


def file_text(name: str, content: dict[str, Any], profile_name: str) -> str:
    """What stands in a rendered file."""
    if name.endswith(".json"):
        return json.dumps(content, indent=2) + "\n"
    header = f"# Written by `embedloom cluster render --profile {profile_name}`; edit cluster.yaml instead.\n"
    if name == "rayjob.yaml":
        made = content["metadata"]
        header += (
            f"# Its files: kubectl create configmap {made['name']} --namespace {made['namespace']} "
            "--from-file=run.yaml=CONFIG --from-file=cluster.yaml=CLUSTER\n"
            "# With them in one file: embedloom submit CONFIG --profile "
            f"{profile_name} --render-job FILE\n"
        )
    return header + yaml.dump(content, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines (a file in a file) as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def check(
    cluster: ClusterConfig,
    profile_name: str,
    *,
    project: Path = Path(),
    crds: Path | None = None,
) -> list[str]:
    """Validate what ``render`` would write, and the project's own Serve config and runtime_env if they are there.

    Args:
        cluster: the cluster config.
        profile_name: one of its profiles.
        project: folder of ``serve/config.yaml`` and ``cluster/runtime_env.yaml``.
        crds: folder with KubeRay's custom resource definitions; None leaves them out.

    Returns:
        One line per file: what was checked.

    Raises:
        ConfigError: the first file that its reader would refuse, or silently misread.
    """
    known = None if crds is None else read_crds(crds)
    lines = []
    for name, content in documents(cluster, profile_name).items():
        line = check_document(name, content)
        if known is not None and "kind" in content:
            line += f"; {check_custom_resource(content, known, name)}"
        lines.append(f"{name}: {line}")
    scaling = cluster.profile(profile_name).serve
    if warning := scaling.cut_off(ServingConfig().request_timeout_seconds):
        lines.append(f"serve: with the default serving.request_timeout_seconds, {warning}")
    serve_config, runtime_env = project / SHIPPED_SERVE_CONFIG, project / SHIPPED_RUNTIME_ENV
    if serve_config.is_file():
        check_serve_config(read_yaml(serve_config), str(serve_config))
        lines.append(f"{serve_config}: valid for Serve, no unknown keys")
    if runtime_env.is_file():
        check_runtime_env(read_yaml(runtime_env), str(runtime_env))
        lines.append(f"{runtime_env}: no unknown keys")
    return lines
