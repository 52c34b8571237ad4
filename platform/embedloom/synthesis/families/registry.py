"""All families by name, and the prompt each uses."""

from typing import Any

from embedloom.config.families import FamilyConfig
from embedloom.synthesis.families.base import Family
from embedloom.synthesis.prompt import SMALL_SUFFIX, Prompt, load_prompt

FAMILIES: dict[str, Family[Any]] = {}


def family_prompt(options: FamilyConfig, small: bool) -> Prompt:
    """The prompt a section names, else its family's own.

    Args:
        options: the family's section.
        small: for a generator below about a billion parameters: shorter messages, answers bounded by patterns.

    Raises:
        ConfigError: see load_prompt.
    """
    family = FAMILIES[options.family]
    name = options.prompt or family.prompt + (SMALL_SUFFIX if small else "")
    return load_prompt(name, family.rules, f"synthesis.families.{options.key}.prompt")
