"""Prompts as data: a YAML file with chat messages, the shape of the answer and the instruction to train with."""

import re
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.artefacts import fingerprint
from embedloom.config.base import FrozenConfig, read_yaml, validate
from embedloom.errors import ConfigError

PLACEHOLDERS = ("document", "title", "lang", "count")
# Only a lone word in braces is a placeholder, so a template may hold JSON examples.
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")


class Message(FrozenConfig):
    """One chat message of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)

    @field_validator("content")
    @classmethod
    def _knows_its_placeholders(cls, content: str) -> str:
        unknown = [name for name in _PLACEHOLDER.findall(content) if name not in PLACEHOLDERS]
        if unknown:
            raise ValueError(
                f"unknown placeholder {{{unknown[0]}}}; allowed: {', '.join(f'{{{p}}}' for p in PLACEHOLDERS)}"
            )
        return content


class Prompt(FrozenConfig):
    """How an LLM is asked for queries, and what its answer looks like.

    ``query_schema`` is the JSON schema of one query; the length bound of the config is added to it.
    """

    version: int = Field(ge=1)
    task_type: Literal["retrieval"] = "retrieval"
    instruction: str = Field(min_length=1)
    messages: tuple[Message, ...] = Field(min_length=1)
    messages_many: tuple[Message, ...] = ()
    query_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "string"})

    @model_validator(mode="after")
    def _shows_the_document(self) -> "Prompt":
        for key, messages in (("messages", self.messages), ("messages_many", self.messages_many)):
            if messages and not any("{document}" in message.content for message in messages):
                raise ValueError(f"{key}: no message has the placeholder {{document}}")
        return self

    @cached_property
    def hash(self) -> str:
        """Sixteen hex digits over the whole content; stands on every row the prompt produced."""
        return fingerprint("prompt", self)

    def templates(self, count: int) -> tuple[Message, ...]:
        """The messages that ask for ``count`` queries.

        Raises:
            ConfigError: several are asked for, but the prompt only says how to ask for one.
        """
        if count > 1 and not self.messages_many:
            raise ConfigError(
                f"synthesis.queries_per_document: {count}, but the prompt has no messages_many; allowed: 1"
            )
        return self.messages_many if count > 1 else self.messages

    def render(self, document: str, title: str, lang: str, count: int) -> tuple[dict[str, str], ...]:
        """Chat messages for one document."""
        values = {"document": document, "title": title, "lang": lang, "count": str(count)}
        return tuple(
            {
                "role": message.role,
                "content": _PLACEHOLDER.sub(lambda found: values[found.group(1)], message.content),
            }
            for message in self.templates(count)
        )

    def answer_schema(self, count: int, max_characters: int) -> dict[str, Any]:
        """JSON schema of the answer: ``{"query": …}``, or ``{"queries": […]}`` for several.

        A query may be one character longer than allowed: one that the bound cut off is then seen to be too
        long and refused, instead of being kept half-said.
        """
        query = dict(self.query_schema)
        if "pattern" not in query:  # xgrammar refuses both together; a pattern bounds the length itself
            query["maxLength"] = max_characters + 1
        shape = (
            query if count == 1 else {"type": "array", "items": query, "minItems": count, "maxItems": count}
        )
        key = answer_key(count)
        return {
            "type": "object",
            "properties": {key: shape},
            "required": [key],
            "additionalProperties": False,
        }


def answer_key(count: int) -> str:
    """The answer's only key."""
    return "query" if count == 1 else "queries"


def load_prompt(name: str) -> Prompt:
    """A prompt of this package by name, or of a ``.yaml`` file by path.

    Raises:
        ConfigError: no such prompt, or it is malformed; names the file, the key and what is allowed.
    """
    if name.endswith((".yaml", ".yml")):
        return validate(Prompt, read_yaml(Path(name).expanduser()), name)
    folder = resources.files("embedloom.synthesis") / "prompts"
    known = sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )
    if name not in known:
        raise ConfigError(
            f"synthesis.prompt: {name!r} is unknown; allowed: {', '.join(known)}, or the path of a .yaml file"
        )
    with resources.as_file(folder / f"{name}.yaml") as path:
        return validate(Prompt, read_yaml(path), f"prompt {name}")
