"""Every prompt a section uses, loaded and checked; light, so that ``plan`` and fingerprints know them too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embedloom.config.families import FamilyConfig, TaskFamilyConfig
from embedloom.config.synthesis import Generator, Sampling, SynthesisConfig
from embedloom.config.teacher import Teacher
from embedloom.errors import DataError
from embedloom.formats import files_at
from embedloom.synthesis.families.registry import FAMILIES, family_prompt
from embedloom.synthesis.families.tasks import tasks_prompt
from embedloom.synthesis.prompt import Prompt
from embedloom.synthesis.quality.judge import judge_prompt


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
    """What decides the rows: the section without who has how many actors, its prompts' content, evaluation files, and
    the teacher where rows are held against one.

    Args:
        config: the section.
        teachers: of the mining section; the first is asked.

    Raises:
        ConfigError: a prompt that is unknown or malformed.
        DataError: evaluation texts that are not there.
    """
    plain = config.model_dump(mode="json")
    for generator in plain["generators"]:
        generator.pop("pool")
    teacher = teachers[0].model_dump(mode="json") if config.quality.round_trip else None
    prompts = used_prompts(config).state()
    return {"section": plain, "prompts": prompts, "guarded": _guarded_state(config), "teacher": teacher}


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


def _guarded_state(config: SynthesisConfig) -> dict[str, list[int]]:
    """Size and modification time of every file of evaluation texts.

    Raises:
        DataError: a name that matches no file.
    """
    check = config.quality.contamination
    found: dict[str, list[int]] = {}
    for number, name in enumerate(check.files if check else ()):
        files = files_at(name)
        if not files:
            raise DataError(
                f"synthesis.quality.contamination.files.{number}: {name!r} does not exist or is empty; "
                "give a file, a folder or a glob"
            )
        found |= {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return found


def _hashes(prompts: dict[str, dict[str, Prompt]]) -> dict[str, dict[str, str]]:
    return {model: {key: prompt.hash for key, prompt in by.items()} for model, by in prompts.items()}
