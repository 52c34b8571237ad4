"""Closed pydantic configuration: unknown keys, wrong types and wrong values become one-line ConfigErrors."""

import difflib
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from embedloom.errors import ConfigError, one_line

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
        raise ConfigError(f"{path}: not readable as YAML: {one_line(error)}") from error
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
            raise ConfigError(f"--set {item!r}: the value is not YAML: {one_line(error)}") from error
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
    if first["type"] == "union_tag_not_found":
        return f"{where}{_untold(model, first)}{more}"
    if first["type"] == "missing":
        return f"{where}: required, but missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    place = f"{where}: " if where else ""
    seen = f" (seen: {first['input']!r})" if first["type"] != "value_error" or where else ""
    return f"{place}{message}{seen}{more}"


def _untold(model: type[BaseModel], problem: Any) -> str:
    """About a section whose kind is unknown because the key that tells it is missing, or misspelt."""
    key = str(problem["ctx"]["discriminator"]).strip("'")
    known = {name for one in _models_in(_annotation_at(model, problem["loc"])) for name in one.model_fields}
    unknown = [str(name) for name in problem["input"] if name not in known]
    near = difflib.get_close_matches(key, unknown, n=1, cutoff=0.0)
    if near:
        return (
            f".{near[0]}: unknown key; the nearest valid key is {key!r}; allowed: {', '.join(sorted(known))}"
        )
    return f".{key}: required, but missing"


def _section_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The section an error's location leads to."""
    found = _models_in(_annotation_at(model, loc))
    return found[0] if found else model


def _annotation_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> Any:
    """Follow an error's location through nested sections, lists, mappings and unions."""
    current: Any = model
    for part in loc:
        current = next((step for one in _sides(current) if (step := _step(one, part)) is not None), current)
    return current


def _sides(annotation: Any) -> list[Any]:
    """The sides of a union, without what annotates them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _sides(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [side for argument in get_args(annotation) for side in _sides(argument)]
    return [annotation]


def _step(annotation: Any, part: int | str) -> Any:
    """What stands at a key, a list's position, or under the value that tells the sides of a union apart."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if part in annotation.model_fields:
            return annotation.model_fields[str(part)].annotation
        tags = [get_args(field.annotation) for field in annotation.model_fields.values()]
        return annotation if (part,) in tags else None
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return arguments[1]
    return arguments[0] if isinstance(part, int) and arguments else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _models_in(argument)]
