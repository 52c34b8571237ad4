"""All families by name, and the prompt each uses."""

from typing import Any

from embedloom.config.synthesis import FamilyConfig
from embedloom.synthesis.families.base import Family
from embedloom.synthesis.families.from_documents import ExistingQuestions, SeedQueries, Translation
from embedloom.synthesis.families.written import STS, Bitext, Classification, LongLong, ShortLong, ShortShort
from embedloom.synthesis.prompt import SMALL_SUFFIX, Prompt, load_prompt

FAMILIES: dict[str, Family[Any]] = {
    family.name: family
    for family in (
        SeedQueries(),
        ShortLong(),
        LongLong(),
        ShortShort(),
        Classification(),
        STS(),
        Bitext(),
        ExistingQuestions(),
        Translation(),
    )
}


def family_prompt(options: FamilyConfig, small: bool) -> Prompt:
    """The prompt a section names, else its family's own.

    Args:
        options: the family's section.
        small: for a generator below about a billion parameters: shorter messages, answers bounded by patterns.

    Raises:
        ConfigError: see load_prompt.
    """
    own, rules = FAMILIES[options.family].own_prompt(options)
    name = options.prompt or own + (SMALL_SUFFIX if small else "")
    return load_prompt(name, rules, f"synthesis.families.{options.key}.prompt")
