"""Rendered KubeRay resources against KubeRay's own definitions, read from a folder of its repository.

The definitions are a megabyte each and belong to KubeRay, so they are not part of this project.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError, best_match

from embedloom.errors import ConfigError, one_line

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


def _describe(error: ValidationError) -> str:
    place = ".".join(str(part) for part in error.absolute_path)
    prefix = f"{place}: " if place else ""
    if error.validator != "additionalProperties" or not isinstance(error.schema, dict):
        return f"{prefix}{error.message:.300}"
    allowed = sorted(error.schema.get("properties", {}))
    unknown = next(str(key) for key in error.instance if key not in allowed)
    near = difflib.get_close_matches(unknown, allowed, n=1, cutoff=0.0)
    nearest = f"; the nearest valid key is {near[0]!r}" if near else ""
    return f"{place + '.' if place else ''}{unknown}: unknown key{nearest}"
