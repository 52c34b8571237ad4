"""Closed pydantic configuration: unknown keys, wrong types and wrong values become one-line ConfigErrors."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from embedloom.errors import ConfigError

Section = TypeVar("Section", bound="FrozenConfig")


class FrozenConfig(BaseModel):
    """Immutable section that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(content).__name__}")
    return content


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply ``section.key=value`` items in order; values are parsed as YAML, list items by number.

    Raises:
        ConfigError: an item without ``=``, or a path through something that is not a section or list.
    """
    for item in overrides:
        path, separator, raw = item.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set {item!r}: expected section.key=value")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {item!r}: the value is not YAML: {' '.join(str(error).split())}"
            ) from error
        _assign(content, path.split("."), value, item)
    return content


def _assign(node: Any, keys: list[str], value: Any, item: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f"--set {item!r}: {key!r} is not an index of a list of {len(node)}")
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {})
        else:
            raise ConfigError(f"--set {item!r}: {'.'.join(keys[:depth])!r} is a value, not a section")


def validate(model: type[Section], content: dict[str, Any], source: str) -> Section:
    """Build ``model`` from ``content``; the first problem becomes a one-line ConfigError naming ``source``."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_describe(model, error)}") from error


def _describe(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A misspelt required key is both unknown and missing; naming the misspelling is what helps.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        allowed = sorted(_section_at(model, first["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.0)
        return (
            f"{where}: unknown key; the nearest valid key is {near[0]!r}; allowed: {', '.join(allowed)}{more}"
        )
    if first["type"] == "missing":
        return f"{where}: required, but missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    place = f"{where}: " if where else ""
    seen = f" (seen: {first['input']!r})" if first["type"] != "value_error" or where else ""
    return f"{place}{message}{seen}{more}"


def _section_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Follow an error's location through nested sections, lists, mappings and unions."""
    current: Any = model
    for part in loc:
        models = _models_in(current)
        if isinstance(part, int):
            continue
        for candidate in models:
            if part in candidate.model_fields:
                current = candidate.model_fields[part].annotation
                break
    found = _models_in(current)
    return found[0] if found else model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _models_in(argument)]
