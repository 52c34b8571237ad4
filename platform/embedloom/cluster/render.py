"""``embedloom cluster render`` and ``check``: write a profile's files, and try them on what Ray itself reads them with."""

import difflib
import json
from pathlib import Path
from typing import Any

import yaml
from jsonschema import ValidationError as JsonSchemaError
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from embedloom.cluster.config import ClusterConfig
from embedloom.cluster.documents import documents
from embedloom.config.base import read_yaml
from embedloom.errors import ConfigError

SHIPPED_SERVE_CONFIG = Path("serve/config.yaml")
# Serve types this field as a plain mapping and fills the model later, so a schema walk alone would not enter
# it.
_OPEN_FIELDS: dict[str, type[BaseModel]] = {"autoscaling_config": AutoscalingConfig}


def render(cluster: ClusterConfig, profile_name: str, out_dir: Path) -> list[Path]:
    """Write the files of one profile and return their paths.

    Raises:
        ConfigError: no such profile, or one that does not make a valid file.
    """
    files = documents(cluster, profile_name)
    _check_documents(files)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in files.items():
        path = out_dir / name
        if path.suffix == ".json":
            path.write_text(json.dumps(content, indent=2) + "\n")
        else:
            header = f"# Written by `embedloom cluster render --profile {profile_name}`; edit cluster.yaml instead.\n"
            path.write_text(header + yaml.safe_dump(content, sort_keys=False))
        paths.append(path)
    return paths


def check(cluster: ClusterConfig, profile_name: str, serve_config: Path = SHIPPED_SERVE_CONFIG) -> list[str]:
    """Validate what ``render`` would write, and the project's own Serve config if it is there.

    Returns:
        One line per file: what was checked.

    Raises:
        ConfigError: the first file that Ray would refuse, or silently misread.
    """
    lines = _check_documents(documents(cluster, profile_name))
    if serve_config.is_file():
        check_serve_config(read_yaml(serve_config), str(serve_config))
        lines.append(f"{serve_config}: valid for Serve, no unknown keys")
    return lines


def _check_documents(files: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, content in files.items():
        if name == "serve.yaml":
            check_serve_config(content, name)
            lines.append(f"{name}: valid for Serve, no unknown keys")
        elif name == "launcher.yaml":
            check_launcher_config(content, name)
            lines.append(f"{name}: valid for the cluster launcher")
        elif name == "raycluster.yaml":
            lines.append(f"{name}: {check_ray_cluster(content, name)}")
        else:
            lines.append(f"{name}: derived, nothing to check")
    return lines


def check_launcher_config(content: dict[str, Any], where: str) -> None:
    """Raise ConfigError if ``ray up`` would refuse the file."""
    try:
        validate_config(content)
    except JsonSchemaError as error:
        place = ".".join(str(part) for part in error.absolute_path)
        raise ConfigError(f"{where}: {place + ': ' if place else ''}{error.message}") from error
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_ray_cluster(content: dict[str, Any], where: str) -> str:
    """What the autoscaler will see of a RayCluster, in one line.

    Raises:
        ConfigError: the autoscaler could not read it.
    """
    try:
        seen = _derive_autoscaling_config_from_ray_cr(content)
        validate_config(seen)
    except (KeyError, ValueError, TypeError, JsonSchemaError, RuntimeError) as error:
        raise ConfigError(f"{where}: the autoscaler cannot read it: {error!r}") from error
    pools = []
    for name, node in seen["available_node_types"].items():
        resources = node["resources"]
        pools.append(
            f"{name} {max(1, node['max_workers'])} x {resources['CPU']} CPU, {resources.get('GPU', 0)} GPU"
        )
    return f"valid for the autoscaler ({'; '.join(pools)})"


def check_serve_config(content: dict[str, Any], where: str) -> None:
    """Raise ConfigError for what Serve refuses, and for the unknown keys it would ignore."""
    _refuse_unknown_keys(ServeDeploySchema, content, where, "")
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {place}: {first['msg']} (seen: {first['input']!r:.80})") from error


def _refuse_unknown_keys(model: type[BaseModel], content: Any, where: str, path: str) -> None:
    if isinstance(content, list):
        for index, item in enumerate(content):
            _refuse_unknown_keys(model, item, where, f"{path}{index}.")
        return
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key not in model.model_fields:
            near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{where}: {path}{key}: unknown key, Serve would ignore it; the nearest is {near!r}"
            )
        inner = _OPEN_FIELDS.get(key) or _model_in(model.model_fields[key].annotation)
        if inner is not None:
            _refuse_unknown_keys(inner, value, where, f"{path}{key}.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model a field holds, directly, in a list or as one side of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _model_in(argument):
            return found
    return None
