"""One rendered file against what reads it: the launcher, KubeRay's autoscaler, Serve, the jobs' runtime_env."""

import difflib
from typing import Any

import yaml
from jsonschema import ValidationError as JsonSchemaError
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from embedloom.config.application import ApplicationArgs
from embedloom.config.base import validate
from embedloom.errors import ConfigError

# Serve types this field as a plain mapping and fills the model later, so a schema walk alone would not enter
# it.
_OPEN_FIELDS: dict[str, type[BaseModel]] = {"autoscaling_config": AutoscalingConfig}
OUR_APPLICATIONS = ("serve.app:build", "embedloom.serving.app:build")


def check_document(name: str, content: dict[str, Any]) -> str:
    """Validate one rendered file and say how it was checked.

    Raises:
        ConfigError: what would read it refuses or misreads it.
    """
    if name == "serve.yaml":
        check_serve_config(content, name)
        return "valid for Serve, no unknown keys"
    if name == "launcher.yaml":
        check_launcher_config(content, name)
        return "valid for the cluster launcher"
    if name == "raycluster.yaml":
        return check_ray_cluster(content, name)
    if name == "rayjob.yaml":
        return check_ray_cluster(_cluster_of(content, "rayClusterSpec"), name)
    if name == "rayservice.yaml":
        check_serve_config(yaml.safe_load(content["spec"]["serveConfigV2"]), f"{name}: spec.serveConfigV2")
        return (
            f"{check_ray_cluster(_cluster_of(content, 'rayClusterConfig'), name)}; its Serve config is valid"
        )
    if name == "runtime_env.yaml":
        check_runtime_env(content, name)
        return "no unknown keys"
    return "derived, nothing to check"


def _cluster_of(content: dict[str, Any], key: str) -> dict[str, Any]:
    """The RayCluster that a RayJob or RayService makes."""
    return {"metadata": content["metadata"], "spec": content["spec"][key]}


def check_runtime_env(content: dict[str, Any], where: str) -> None:
    """Raise ConfigError for a key of a runtime_env that Ray does not know; it would only warn."""
    for key in content:
        if key not in RuntimeEnv.known_fields:
            near = difflib.get_close_matches(str(key), RuntimeEnv.known_fields, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}: {key}: unknown key; the nearest valid key is {near!r}")


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
    """Raise ConfigError for what Serve refuses, and for the unknown keys it would ignore.

    The ``args`` of our own application, which Serve hands on unread, are read too.
    """
    _refuse_unknown_keys(ServeDeploySchema, content, where, "")
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {place}: {first['msg']} (seen: {first['input']!r:.80})") from error
    for number, application in enumerate(content["applications"]):
        if application["import_path"] in OUR_APPLICATIONS:
            validate(ApplicationArgs, application.get("args", {}), f"{where}: applications.{number}.args")


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
                f"{where}: {path}{key}: unknown key, Serve would ignore it; the nearest valid key is {near!r}"
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
