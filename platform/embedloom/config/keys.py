"""The keys of a config file, read from its JSON Schema: looked up by name, listed, and written as a reference page."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, NoDefault
from pydantic_core import core_schema

from embedloom.errors import ConfigError

INDEX, NAME = "N", "NAME"  # parts of a key's path that stand for a list's index and for a name of one's own
SECTION_DEFAULT = "its keys' defaults"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SIMPLE = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "mapping",
    "array": "list",
}
_PLURAL = {"text": "texts", "whole number": "whole numbers", "number": "numbers", "section": "sections"}

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One key of a config file.

    Attributes:
        path: with dots; ``N`` stands for the index of a list, ``NAME`` for a name of the user's own.
        kind: type of its value in words.
        allowed: what its values may be; empty where the type tells it all.
        default: as YAML, or "required".
        description: what the key does.
        variants: kinds of the section that have the key so; empty where all have.
        section: path of its section's keys, without their own names; None for a plain value.
        model: name of that section's class, the same wherever the section stands.
    """

    path: str
    kind: str
    allowed: str
    default: str
    description: str
    variants: tuple[str, ...] = ()
    section: str | None = None
    model: str = ""

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def parent(self) -> str:
        """Path of the section that the key stands in; empty at the top."""
        return self.path.rpartition(".")[0]

    @property
    def first_sentence(self) -> str:
        """The description up to its first full stop."""
        return self.description.split(". ", 1)[0].rstrip(".") + "."


class _Generator(GenerateJsonSchema):
    """Without titles, which repeat the keys; with the defaults that are made anew for every config."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        if "default_factory" in schema:
            return schema["default_factory"]()  # type: ignore[call-arg]  # none of ours takes the other values
        return schema.get("default", NoDefault)


def config_schema(model: type[BaseModel], title: str) -> dict[str, Any]:
    """JSON Schema (2020-12) of a config file, for editors and validators."""
    return {"$schema": _DIALECT, **model.model_json_schema(schema_generator=_Generator), "title": title}


def config_keys(schema: Schema) -> list[ConfigKey]:
    """All keys in the order of the file, each section's keys before those of the sections in it."""
    found: list[ConfigKey] = []
    waiting: list[tuple[str, Sequence[Schema]]] = [("", [schema])]
    while waiting:
        path, variants = waiting.pop(0)
        keys = _merged(list(_keys_of(variants, path, schema)))
        found += keys
        children = {key.section: _children(variants, key, schema) for key in keys if key.section is not None}
        waiting[:0] = list(children.items())
    return found


def _keys_of(variants: Sequence[Schema], path: str, root: Schema) -> Iterator[ConfigKey]:
    told_apart = len(variants) > 1
    for variant in variants:
        tags = tuple(_tag(variant)) if told_apart else ()
        for name, value in variant["properties"].items():
            if value.get("deprecated"):
                continue
            sections, suffix = _sections(value, root)
            own = f"{path}.{name}" if path else name
            yield ConfigKey(
                path=own,
                kind=_kind(value, root),
                allowed=", ".join(_allowed(value, root)),
                default="required" if told_apart and "const" in value else _default(value, bool(sections)),
                description=value.get("description", "").replace("``", "`"),
                variants=tags,
                section=own + suffix if sections else None,
                model=sections[0]["$name"] if len(sections) == 1 else "",
            )


def _tag(variant: Schema) -> Iterator[str]:
    """What a section states of itself where several kinds may stand: the value of its only fixed key."""
    for value in variant["properties"].values():
        if "const" in value:
            yield str(value["const"])


def _merged(keys: Sequence[ConfigKey]) -> list[ConfigKey]:
    """Keys that several kinds of a section have alike, once; those that all have, without the kinds."""
    kinds = {tag for key in keys for tag in key.variants}
    found: dict[ConfigKey, tuple[str, ...]] = {}
    for key in keys:
        plain = replace(key, variants=())
        found[plain] = (*found.get(plain, ()), *key.variants)
    return [replace(key, variants=() if set(tags) == kinds else tags) for key, tags in found.items()]


def _children(variants: Sequence[Schema], key: ConfigKey, root: Schema) -> Sequence[Schema]:
    return next(
        _sections(one["properties"][key.name], root)[0] for one in variants if key.name in one["properties"]
    )


def _alternatives(node: Schema, root: Schema) -> list[dict[str, Any]]:
    """What may stand at a node, references followed and null left out."""
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[-1]
        return [{**one, "$name": name} for one in _alternatives(root["$defs"][name], root)]
    nested = node.get("anyOf") or node.get("oneOf")
    if nested and "properties" not in node:
        return [found for one in nested for found in _alternatives(one, root)]
    return [] if node.get("type") == "null" else [dict(node)]


def _sections(node: Schema, root: Schema) -> tuple[list[dict[str, Any]], str]:
    """The sections that a node holds, and what of a path leads to their keys."""
    for one in _alternatives(node, root):
        if "properties" in one:
            return [kind for kind in _alternatives(node, root) if "properties" in kind], ""
        for inner, part in ((one.get("items"), INDEX), (one.get("additionalProperties"), NAME)):
            if isinstance(inner, dict):
                found, suffix = _sections(inner, root)
                if found:
                    return found, f".{part}{suffix}"
    return [], ""


def _kind(node: Schema, root: Schema) -> str:
    kinds = dict.fromkeys(_plain_kind(one, root) for one in _alternatives(node, root))
    null = any(one.get("type") == "null" for one in node.get("anyOf", ()))
    return " or ".join([*kinds, *(["null"] if null else [])]) or "any value"


def _plain_kind(node: Schema, root: Schema) -> str:
    if "properties" in node:
        return "section"
    inner = node.get("additionalProperties")
    if isinstance(inner, dict) and inner:
        return f"mapping of names to {_several(inner, root)}"
    if "prefixItems" in node:
        return f"list of {len(node['prefixItems'])} {_several(node['prefixItems'][0], root)}"
    if node.get("items"):
        return f"list of {_several(node['items'], root)}"
    if "const" in node:
        return _SIMPLE["integer" if isinstance(node["const"], int) else "string"]
    return _SIMPLE.get(str(node.get("type")), "any value")


def _several(node: Schema, root: Schema) -> str:
    kind = _kind(node, root)
    return _PLURAL.get(kind, kind)


def _allowed(node: Schema, root: Schema) -> Iterator[str]:
    """What bounds the values of a node, or those of its items."""
    for one in _alternatives(node, root):
        if "properties" in one:
            continue
        for values in (one.get("enum"), [one["const"]] if "const" in one else None):
            yield from map(str, values or ())
        yield from _bounds(one)
        if "pattern" in one:
            yield f"text that fits {one['pattern']}"
        for key in ("minItems", "minProperties"):
            if key in one and "maxItems" not in one:
                yield "not empty" if one[key] == 1 else f"at least {one[key]} entries"
        if isinstance(one.get("items"), dict):
            yield from _allowed(one["items"], root)


def _bounds(node: Schema) -> Iterator[str]:
    for key, text in (
        ("minimum", "{:g} or more"), ("exclusiveMinimum", "above {:g}"),
        ("maximum", "at most {:g}"), ("exclusiveMaximum", "below {:g}"),
    ):  # fmt: skip
        if key in node:
            yield text.format(node[key])


def _default(node: Schema, section: bool) -> str:
    if "default" not in node:
        return "required"
    if section and isinstance(node["default"], dict):
        return SECTION_DEFAULT
    return json.dumps(node["default"], ensure_ascii=False)


def find_keys(keys: Sequence[ConfigKey], path: str) -> list[ConfigKey]:
    """The keys that a path names, several where the kinds of a section have it differently; none if it is unknown.

    Indices and names of one's own may be given or left out: ``training.stages.0.negatives`` and
    ``training.stages.negatives`` name one key. An entry (``training.mix.public``, ``profiles.local``) names what holds it.
    """
    parts = path.replace("[", ".").replace("]", "").strip(".").split(".")
    found = [(rank, key) for key in keys if (rank := _rank(parts, key.path.split("."))) is not None]
    if found:
        best = max(rank for rank, _ in found)
        return [key for rank, key in found if rank == best]
    if len(parts) < 2:
        return []
    holders = find_keys(keys, ".".join(parts[:-1]))
    return [key for key in holders if key.kind.startswith("list" if parts[-1].isdigit() else "mapping")]


def _rank(given: Sequence[str], path: Sequence[str]) -> int | None:
    """How many parts agree literally; None if the path is another."""
    if not path:
        return None if given else 0
    head, rest = path[0], path[1:]
    ranks = []
    if given and given[0] == head:
        ranks.append((_rank(given[1:], rest), 1))
    if head in (INDEX, NAME):
        ranks.append((_rank(given, rest), 0))
        if given and (head == NAME or given[0].isdigit()):
            ranks.append((_rank(given[1:], rest), 0))
    return max((rank + more for rank, more in ranks if rank is not None), default=None)


def nearest_paths(keys: Sequence[ConfigKey], path: str, count: int = 4) -> list[str]:
    """Paths of keys that somebody may have meant: those that end alike, then those spelt alike."""
    paths = list(dict.fromkeys(key.path for key in keys))
    last = path.rsplit(".", 1)[-1]
    alike = [one for one in paths if one.rsplit(".", 1)[-1] == last]
    if alike:
        return alike[:count]
    close = difflib.get_close_matches(path, paths, n=count, cutoff=0.0)
    names = {one.rsplit(".", 1)[-1] for one in paths}
    near = difflib.get_close_matches(last, names, n=1, cutoff=0.75)
    ending = [one for one in paths if near and one.rsplit(".", 1)[-1] == near[0]]
    return list(dict.fromkeys([*ending, *close]))[:count]


def key_or_nearest(keys: Sequence[ConfigKey], path: str) -> list[ConfigKey]:
    """As ``find_keys``.

    Raises:
        ConfigError: no such key; names the nearest ones.
    """
    found = find_keys(keys, path)
    if not found:
        raise ConfigError(f"{path}: no config key; the nearest are {', '.join(nearest_paths(keys, path))}")
    return found
