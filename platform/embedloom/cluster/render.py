"""``embedloom cluster render`` and ``check``: write a profile's files, and try them on what reads them."""

import difflib
import json
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator
from jsonschema import ValidationError as JsonSchemaError
from jsonschema.exceptions import best_match
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from embedloom.cluster.manifests import documents
from embedloom.config.base import read_yaml, validate
from embedloom.config.cluster import ClusterConfig
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.errors import ConfigError, one_line

# Rendered KubeRay resources against KubeRay's own definitions, read from a folder of its repository.
#
# The definitions are a megabyte each and belong to KubeRay, so they are not part of this project.


_DEFINITION = "CustomResourceDefinition"
_OPEN = "x-kubernetes-preserve-unknown-fields"

Schemas = dict[tuple[str, str], dict[str, Any]]  # (apiVersion, kind) -> strict JSON schema


def read_crds(folder: Path) -> Schemas:
    """Schemas of all definitions in a folder's YAML files.

    Raises:
        ConfigError: no such folder, a file that is not YAML, or no definition in any.
    """
    if not folder.is_dir():
        raise ConfigError(f"--crds: {folder}: no such folder")
    found: Schemas = {}
    for path in sorted(folder.rglob("*.y*ml")):
        try:
            contents = list(yaml.safe_load_all(path.read_text()))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not readable as YAML: {one_line(error)}") from error
        for content in contents:
            if isinstance(content, dict) and content.get("kind") == _DEFINITION:
                found |= _versions(content["spec"])
    if not found:
        raise ConfigError(f"--crds: {folder}: no {_DEFINITION} in its YAML files")
    return found


def _versions(spec: dict[str, Any]) -> Schemas:
    return {
        (f"{spec['group']}/{version['name']}", spec["names"]["kind"]): _strict(
            version["schema"]["openAPIV3Schema"]
        )
        for version in spec["versions"]
        if version.get("served", True)
    }


def _strict(schema: Any) -> Any:
    """The schema with unknown keys refused: Kubernetes drops them in silence.

    ``metadata`` is a bare object in every definition; the API server knows its keys.
    """
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        key: {name: _strict(inner) for name, inner in value.items()}
        if key == "properties"
        else _strict(value)
        for key, value in schema.items()
    }
    if isinstance(strict.get("properties"), dict) and not strict.get(_OPEN):
        strict.setdefault("additionalProperties", False)
    if strict.get("nullable") and isinstance(strict.get("type"), str):
        strict["type"] = [strict["type"], "null"]
    return strict


def check_custom_resource(content: dict[str, Any], schemas: Schemas, where: str) -> str:
    """Validate one resource against its definition and say which that was.

    Raises:
        ConfigError: naming the file, the key, and the nearest valid key or the value seen.
    """
    identity = (str(content["apiVersion"]), str(content["kind"]))
    if identity not in schemas:
        known = ", ".join(f"{version} {kind}" for version, kind in sorted(schemas))
        raise ConfigError(
            f"{where}: no definition of {' '.join(identity)} in the --crds folder; found: {known}"
        )
    error = best_match(Draft7Validator(schemas[identity]).iter_errors(content))
    if error is not None:
        raise ConfigError(f"{where}: {_describe(error)}") from error
    return f"valid for the definition of {' '.join(identity)}"


def _describe(error: JsonSchemaError) -> str:
    place = ".".join(str(part) for part in error.absolute_path)
    prefix = f"{place}: " if place else ""
    if error.validator != "additionalProperties" or not isinstance(error.schema, dict):
        return f"{prefix}{error.message:.300}"
    allowed = sorted(error.schema.get("properties", {}))
    unknown = next(str(key) for key in error.instance if key not in allowed)
    near = difflib.get_close_matches(unknown, allowed, n=1, cutoff=0.0)
    nearest = f"; the nearest valid key is {near[0]!r}" if near else ""
    return f"{place + '.' if place else ''}{unknown}: unknown key{nearest}"


# One rendered file against what reads it: the launcher, KubeRay's autoscaler, Serve, the jobs' runtime_env.


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
