"""Every prompt a section uses, loaded and checked; light, so that ``plan`` and fingerprints know them too."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedloom.config.mining import Teacher
from embedloom.config.synthesis import (
    ASKING,
    FamilyConfig,
    Generator,
    Sampling,
    SynthesisConfig,
    TaskFamilyConfig,
)
from embedloom.core.contents import Contents, digest, path_contents
from embedloom.core.storage import files_at
from embedloom.encoder.registry import models_here
from embedloom.errors import DataError
from embedloom.synthesis.families.registry import FAMILIES, family_prompt
from embedloom.synthesis.families.written import tasks_prompt
from embedloom.synthesis.judge import judge_prompt
from embedloom.synthesis.prompt import Prompt

FINAL_FOLDERS = ("pairs", "rejects", "tasks")  # of the artefact: cut from the rounds' rows to the quotas
_PROMPT_KEYS = ("prompt", "tasks_prompt")


@dataclass(frozen=True)
class UsedPrompts:
    """Prompts by generator and family key; ``judge`` where rows are judged."""

    rows: dict[str, dict[str, Prompt]]
    tasks: dict[str, dict[str, Prompt]]
    judge: Prompt | None

    def state(self) -> dict[str, Any]:
        """What of them decides the rows: their hashes."""
        return {
            "rows": _hashes(self.rows),
            "tasks": _hashes(self.tasks),
            "judge": self.judge.hash if self.judge else None,
        }


def used_prompts(config: SynthesisConfig) -> UsedPrompts:
    """Load every prompt of a section.

    Raises:
        ConfigError: an unknown or malformed prompt, or one with an unknown placeholder; see load_prompt.
    """
    asking = [options for options in config.families if not FAMILIES[options.family].extracts]
    return UsedPrompts(
        rows={g.model: {o.key: family_prompt(o, g.small) for o in asking} for g in config.generators},
        tasks={
            g.model: {o.key: tasks_prompt(o, g.small) for o in task_families(config)}
            for g in config.generators
        },
        judge=judge_prompt(config.quality.judge) if config.quality.judge else None,
    )


def task_families(config: SynthesisConfig) -> list[TaskFamilyConfig]:
    """Sections that are written from brainstormed tasks."""
    return [options for options in config.families if isinstance(options, TaskFamilyConfig)]


def section_state(config: SynthesisConfig, teachers: Sequence[Teacher]) -> dict[str, Any]:
    """What decides the rows: the section without who has how many actors, and what its prompts, evaluation texts and
    models hold, wherever they lie; the teacher where rows are held against one.

    Args:
        config: the section.
        teachers: of the mining section; the first is asked.

    Raises:
        ConfigError: a prompt that is unknown or malformed.
        DataError: evaluation texts that are not there.
    """
    plain = config.model_dump(mode="json")
    for generator, stated in zip(plain["generators"], config.generators, strict=True):
        generator.pop("pool")
        if stated.endpoint is not None:
            generator["endpoint"] = stated.endpoint.facts()
    if config.quality.judge is not None and config.quality.judge.endpoint is not None:
        plain["quality"]["judge"]["endpoint"] = config.quality.judge.endpoint.facts()
    for family in plain["families"]:
        family |= {key: None for key in _PROMPT_KEYS if _is_file(family.get(key))}
    if config.quality.judge is not None and _is_file(config.quality.judge.prompt):
        plain["quality"]["judge"]["prompt"] = None
    if plain["quality"]["contamination"] is not None:
        plain["quality"]["contamination"]["files"] = []
    teacher = teachers[0].model_dump(mode="json") if config.quality.round_trip else None
    prompts = used_prompts(config).state()
    guarded = {number: digest(held) for number, held in enumerate(_guarded(config).values())}
    state = {"section": plain, "prompts": prompts, "guarded": guarded, "teacher": teacher}
    opened = section_models(config, teachers)
    models = {name: digest(held) for name, held in models_here(opened).items()}
    return {**state, "models": models} if models else state


def other_amounts(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether two states of a section with their seeds ask for the same rows but for how many: what was written for one counts.

    Args:
        before: recorded ``(section_state, seed)``, as JSON has it.
        now: the same of the config.
    """
    return len(before) == len(now) and _without_amounts(before) == _without_amounts(now)


def _without_amounts(settings: Sequence[Any]) -> Any:
    state, *others = settings
    section = {key: value for key, value in state["section"].items() if key not in ASKING}
    families = [{**family, "rows": None} for family in section["families"]]
    return [{**state, "section": {**section, "families": families}}, *others]


def section_reads(config: SynthesisConfig, teachers: Sequence[Teacher]) -> dict[str, Contents]:
    """What the files hold that decide the rows, by what the config calls them.

    Raises:
        DataError: evaluation texts that are not there.
    """
    sections = [options.model_dump(include=set(_PROMPT_KEYS)) for options in config.families]
    names = [name for section in sections for name in section.values()]
    names += [] if config.quality.judge is None else [config.quality.judge.prompt]
    prompts = [name for name in names if _is_file(name)]
    opened = section_models(config, teachers)
    return models_here(opened) | _guarded(config) | {str(name): path_contents(str(name)) for name in prompts}


def section_models(config: SynthesisConfig, teachers: Sequence[Teacher]) -> list[str]:
    """The models that take part: those that write, the judge, and the teacher where it is asked."""
    names = local_models(config)
    if config.quality.round_trip is not None and teachers[0].engine != "openai":
        names.append(teachers[0].model)
    return names


def local_models(config: SynthesisConfig) -> list[str]:
    """The generators and the judge that engines of ours run."""
    found = [generator.model for generator in config.generators if generator.endpoint is None]
    judge = config.quality.judge
    return found if judge is None or judge.endpoint is not None else [*found, judge.model]


def _guarded(config: SynthesisConfig) -> dict[str, Contents]:
    """The files of evaluation texts.

    Raises:
        DataError: a name that matches no file.
    """
    check = config.quality.contamination
    found: dict[str, Contents] = {}
    for number, name in enumerate(check.files if check else ()):
        if not files_at(name):
            raise DataError(
                f"synthesis.quality.contamination.files.{number}: {name!r} does not exist or is empty; "
                "give a file, a folder or a glob"
            )
        found[name] = path_contents(name)
    return found


def _is_file(prompt: Any) -> bool:
    return (
        isinstance(prompt, str) and prompt.endswith((".yaml", ".yml")) and Path(prompt).expanduser().is_file()
    )


def languages_of(options: FamilyConfig, config: SynthesisConfig) -> dict[str, float]:
    """Query languages of a family and their weights."""
    return options.languages or config.languages


def sampling_of(options: FamilyConfig, section: Sampling) -> Sampling:
    """The section's sampling with what the family says otherwise."""
    own = {
        name: value
        for name in ("sampling_temperature", "top_p", "max_new_tokens")
        if (value := getattr(options, name)) is not None
    }
    return section.model_copy(update=own)


def writers(config: SynthesisConfig) -> list[Generator]:
    """Generators that write at all."""
    return [generator for generator in config.generators if generator.weight > 0]


def _hashes(prompts: dict[str, dict[str, Prompt]]) -> dict[str, dict[str, str]]:
    return {model: {key: prompt.hash for key, prompt in by.items()} for model, by in prompts.items()}
