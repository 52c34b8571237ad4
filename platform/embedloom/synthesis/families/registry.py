"""All families by name, and the prompt each uses."""

from typing import Any

from embedloom.config.families import FamilyConfig
from embedloom.synthesis.families.base import Family
from embedloom.synthesis.families.bitext import Bitext
from embedloom.synthesis.families.classification import Classification
from embedloom.synthesis.families.existing_questions import ExistingQuestions
from embedloom.synthesis.families.long_long import LongLong
from embedloom.synthesis.families.seed_queries import SeedQueries
from embedloom.synthesis.families.short_long import ShortLong
from embedloom.synthesis.families.short_short import ShortShort
from embedloom.synthesis.families.sts import STS
from embedloom.synthesis.families.translation import Translation
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
