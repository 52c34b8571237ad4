"""Prompts as data: a YAML file with chat messages, the fields of the answer and the attributes that are sampled."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from embedloom.config.base import FrozenConfig, read_yaml, validate
from embedloom.core.artefacts import fingerprint
from embedloom.errors import ConfigError

SMALL_SUFFIX = "_small"
# Only a lone word in braces is a placeholder, so a template may hold JSON examples.
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")


@dataclass(frozen=True, slots=True)
class PromptRules:
    """What the user of a prompt fills in and reads back.

    Attributes:
        fields: keys of the answer; all are required, no other is allowed.
        placeholders: what messages may hold besides the prompt's own attributes.
        required: placeholders that at least one message must hold.
    """

    fields: tuple[str, ...]
    placeholders: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


class Message(FrozenConfig):
    """One chat message of a prompt."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks, as in a chat.")
    content: str = Field(
        min_length=1,
        description="What is said. A lone word in braces is a placeholder, filled in for each attempt.",
    )

    @property
    def placeholders(self) -> list[str]:
        """Names in braces, in order."""
        return _PLACEHOLDER.findall(self.content)


class Prompt(FrozenConfig):
    """How an LLM is asked, and what its answer looks like."""

    version: int = Field(
        ge=1, description="Number for people; what identifies a prompt is a hash over all of it."
    )
    instruction: str | None = Field(
        default=None,
        min_length=1,
        description="Training instruction of the rows. Null: the sentence of the task that a row was written for.",
    )
    attributes: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Placeholder -> values, of which one is drawn for each attempt, such as persona or length.",
    )
    messages: tuple[Message, ...] = Field(min_length=1, description="Chat messages that ask the LLM.")
    fields: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Key of the answer -> JSON Schema of its text, or of one text where it is a list.",
    )

    @field_validator("attributes")
    @classmethod
    def _has_choices(cls, attributes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, choices in attributes.items():
            if not _PLACEHOLDER.fullmatch(f"{{{name}}}"):
                raise ValueError(f"{name!r} cannot be a placeholder; allowed: letters and underscores")
            if not choices:
                raise ValueError(f"{name!r} has no values to draw from")
        return attributes

    @cached_property
    def hash(self) -> str:
        """Sixteen hex digits over the whole content; stands on every row the prompt produced."""
        return fingerprint("prompt", self)

    def render(self, values: Mapping[str, str]) -> tuple[dict[str, str], ...]:
        """Chat messages with every placeholder filled in once."""
        return tuple(
            {
                "role": message.role,
                "content": _PLACEHOLDER.sub(lambda found: values[found.group(1)], message.content),
            }
            for message in self.messages
        )

    def answer_schema(
        self, limits: Mapping[str, int], counts: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """JSON schema of the answer, an object with every field.

        A text may be one character longer than allowed: one that the bound cut off is then seen to be too long
        and refused, instead of being kept half-said.

        Args:
            limits: field -> most characters of a text.
            counts: field -> texts in its list; a field without a count is one text.
        """
        shapes: dict[str, Any] = {}
        for name, field in self.fields.items():
            shape = dict(field)
            # xgrammar refuses a pattern and a length together; a pattern bounds the length itself.
            if name in limits and shape.get("type") == "string" and not {"pattern", "enum"} & shape.keys():
                shape["maxLength"] = limits[name] + 1
            count = (counts or {}).get(name)
            shapes[name] = (
                shape
                if count is None
                else {"type": "array", "items": shape, "minItems": count, "maxItems": count}
            )
        return {
            "type": "object",
            "properties": shapes,
            "required": list(shapes),
            "additionalProperties": False,
        }


def load_prompt(name: str, rules: PromptRules, where: str = "prompt") -> Prompt:
    """A prompt of this package by name, or of a ``.yaml`` file by path.

    Args:
        name: of a file in ``synthesis/prompts`` without its suffix, or the path of a YAML file.
        rules: of the one who uses it.
        where: config key, named in errors.

    Raises:
        ConfigError: no such prompt, malformed, an unknown or missing placeholder, or other fields than the user
            reads; names the file, the key and what is allowed.
    """
    if name.endswith((".yaml", ".yml")):
        prompt, source = validate(Prompt, read_yaml(Path(name).expanduser()), name), name
    else:
        prompt, source = _packaged(name, where), f"prompt {name}"
    _check_placeholders(prompt, rules, source)
    if set(prompt.fields) != set(rules.fields):
        raise ConfigError(
            f"{source}: fields are {', '.join(sorted(prompt.fields))}; allowed: exactly {', '.join(sorted(rules.fields))}"
        )
    return prompt


def _packaged(name: str, where: str) -> Prompt:
    folder = resources.files("embedloom.synthesis") / "prompts"
    known = sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )
    if name not in known:
        raise ConfigError(
            f"{where}: {name!r} is unknown; allowed: {', '.join(known)}, or the path of a .yaml file"
        )
    with resources.as_file(folder / f"{name}.yaml") as path:
        return validate(Prompt, read_yaml(path), f"prompt {name}")


def _check_placeholders(prompt: Prompt, rules: PromptRules, source: str) -> None:
    clash = sorted(set(prompt.attributes) & set(rules.placeholders))
    if clash:
        raise ConfigError(f"{source}: attributes.{clash[0]}: the name is taken; choose another")
    allowed = [*rules.placeholders, *prompt.attributes]
    for number, message in enumerate(prompt.messages):
        unknown = [name for name in message.placeholders if name not in allowed]
        if unknown:
            raise ConfigError(
                f"{source}: messages.{number}.content: unknown placeholder {{{unknown[0]}}}; allowed: "
                f"{', '.join(f'{{{one}}}' for one in allowed) or 'none'}"
            )
    held = {name for message in prompt.messages for name in message.placeholders}
    for name in rules.required:
        if name not in held:
            raise ConfigError(f"{source}: messages: no message has the placeholder {{{name}}}")
