"""The phases of a section: which quotas, prompts, sources and comparisons each has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedloom.config.families import FamilyConfig, TranslationConfig
from embedloom.config.resources import PoolConfig
from embedloom.config.synthesis import EngineOptions, SynthesisConfig
from embedloom.engines.generation import generation_arguments
from embedloom.engines.protocol import EngineFactory
from embedloom.retrieval.ahead import Ahead
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.storage import Place
from embedloom.synthesis.duplicate_pass import (
    DUPLICATES_FOLDER,
    DuplicateSearch,
    bucket_count,
    refuse_duplicates,
)
from embedloom.synthesis.families.registry import FAMILIES
from embedloom.synthesis.judge_pass import JUDGE_FOLDER, Judge, refuse_ungraded
from embedloom.synthesis.pools import Placed
from embedloom.synthesis.prompts_used import UsedPrompts, languages_of, task_families, writers
from embedloom.synthesis.quotas import Cell, quotas
from embedloom.synthesis.refusals import Round
from embedloom.synthesis.round_trip_pass import (
    DOCUMENTS_FOLDER,
    ROUND_TRIP_FOLDER,
    RoundTrip,
    refuse_unfound,
)
from embedloom.synthesis.round_work import RoundWork, Stretch
from embedloom.synthesis.rounds import STAGE, Phase
from embedloom.synthesis.row_maker import RowMaker, TaskMaker
from embedloom.synthesis.selection import RowSource

TASKS_FOLDER = "tasks"
TASK_LANGUAGE = "eng"  # of task sentences, which become training instructions
_Compare = tuple[str, Callable[[Round, tuple[str, ...]], None]]


@dataclass(frozen=True)
class Surroundings:
    """Everything a phase needs besides the section.

    Attributes:
        models: gives the local model folder, by name, on the machine where it is called.
        teacher: of the round trip; None without that check.
        guard: file of the index of evaluation texts, if there is one.
        ahead: embeds rows while others are written, if that is wanted.
    """

    config: SynthesisConfig
    seed: int
    corpus: Place
    place: Place
    pool: PoolConfig
    models: Mapping[str, Callable[[], Path]]
    engine_factory: EngineFactory
    prompts: UsedPrompts
    teacher_pool: PoolConfig
    teacher: EmbedderSource | None = None
    guard: tuple[Place, str] | None = None
    ahead: Ahead | None = None

    def arguments(self, model: str, options: EngineOptions, pool: PoolConfig) -> dict[str, Any]:
        """Constructor arguments of actors that run a model."""
        return generation_arguments(self.models[model], options, pool, self.engine_factory)

    def documents(self) -> RowSource:
        """The train split; held-out documents are never shown to an LLM."""
        names = self.corpus.names(DOCUMENTS_FOLDER, ".parquet")
        return RowSource("documents", tuple((self.corpus, name) for name in names), same_language=True)


def task_phase(around: Surroundings) -> Phase | None:
    """Step one: task sentences for the families that need them."""
    config = around.config
    families: dict[str, FamilyConfig] = {options.key: options for options in task_families(config)}
    if not families:
        return None
    cells = quotas(
        dict.fromkeys(families, config.tasks.count),
        {generator.model: generator.weight for generator in writers(config)},
        {key: {TASK_LANGUAGE: 1.0} for key in families},
    )
    compare = _duplicates(around, "family", sum(cells.values()), (), near=False)
    return Phase(
        name="tasks",
        rows_per_attempt={options.key: options.tasks_per_answer for options in task_families(config)},
        maker=lambda generator: TaskMaker(families, around.prompts.tasks[generator], config),
        compare=(compare,),
        **_common(around, families, cells, around.prompts.tasks, "", {}),
    )


def row_phase(
    around: Surroundings,
    name: str,
    families: Mapping[str, FamilyConfig],
    earlier: tuple[str, ...],
    pairs: RowSource,
) -> Phase:
    """Rows of some families.

    Args:
        around: see Surroundings.
        name: of the phase.
        families: sections by key.
        earlier: folders of the rounds of earlier phases, whose rows count as written before.
        pairs: what translations read.
    """
    config = around.config
    asking = {key: options for key, options in families.items() if not FAMILIES[options.family].extracts}
    extracting = {key: options for key, options in families.items() if key not in asking}
    weights = {generator.model: generator.weight for generator in writers(config)}
    languages = {key: languages_of(options, config) for key, options in families.items()}
    cells = quotas({key: options.rows for key, options in asking.items()}, weights, languages) | quotas(
        {key: options.rows for key, options in extracting.items()}, {"": 1.0}, languages
    )
    return Phase(
        name=name,
        rows_per_attempt={
            # How many questions a document holds is seen when it is read.
            key: 1 if key in extracting else FAMILIES[one.family].asked_rows(one)
            for key, one in families.items()
        },
        maker=lambda generator: RowMaker(
            families, around.prompts.rows.get(generator, {}), config, around.guard
        ),
        compare=_comparisons(around, earlier),
        extracting=frozenset(extracting),
        ahead=around.ahead,
        **_common(
            around, families, cells, around.prompts.rows, TASKS_FOLDER,
            {key: pairs for key, one in families.items() if FAMILIES[one.family].source == "pairs"},
        ),
    )  # fmt: skip


def written_first(config: SynthesisConfig) -> dict[str, FamilyConfig]:
    """Families that start from the corpus or from nothing."""
    last = translated_last(config)
    return {options.key: options for options in config.families if options.key not in last}


def translated_last(config: SynthesisConfig) -> dict[str, FamilyConfig]:
    """Families that start from the rows of the others."""
    return {
        options.key: options
        for options in config.families
        if isinstance(options, TranslationConfig) and options.pairs == "synthetic"
    }


def _common(
    around: Surroundings,
    families: Mapping[str, FamilyConfig],
    cells: Mapping[Cell, int],
    prompts: Mapping[str, Mapping[str, Any]],
    tasks: str,
    pairs: Mapping[str, RowSource],
) -> dict[str, Any]:
    config = around.config

    def work(stretches: tuple[Stretch, ...], folder: str, offsets: Mapping[str, Any]) -> RoundWork:
        return RoundWork(
            seed=around.seed,
            stretches=stretches,
            families=families,
            prompt_hashes={model: {key: p.hash for key, p in by.items()} for model, by in prompts.items()},
            generators=tuple(generator.model for generator in config.generators),
            place=around.place,
            folder=folder,
            documents=around.documents(),
            pairs=pairs,
            tasks=tasks,
            cross_model=config.tasks.cross_model,
            offsets=offsets,
        )

    def arguments(placed: Placed) -> dict[str, Any]:
        return around.arguments(placed.generator.model, placed.generator.engine, placed.pool)

    return {
        "config": config, "place": around.place, "pool": around.pool, "quotas": cells, "families": families,
        "work": work, "arguments": arguments,
    }  # fmt: skip


def _comparisons(around: Surroundings, earlier: tuple[str, ...]) -> tuple[_Compare, ...]:
    quality = around.config.quality
    found: list[_Compare] = []
    if quality.exact_duplicates or quality.near_duplicates is not None:
        total = sum(options.rows for options in around.config.families)
        found.append(_duplicates(around, "task_type", total, earlier, near=True))
    if quality.round_trip is not None and around.teacher is not None:
        trip = RoundTrip(
            around.place, around.corpus, around.teacher, around.teacher_pool, quality.round_trip.top_k
        )
        found.append((ROUND_TRIP_FOLDER, lambda one, _: refuse_unfound(STAGE, trip, one)))
    if quality.judge is not None and around.prompts.judge is not None:
        own = (g.engine for g in around.config.generators if g.model == quality.judge.model)
        options = next(own, EngineOptions())
        judge = Judge(
            around.place, quality.judge, around.prompts.judge, options, around.pool,
            around.arguments(quality.judge.model, options, around.pool), around.config.shard_rows,
        )  # fmt: skip
        found.append((JUDGE_FOLDER, lambda one, _: refuse_ungraded(STAGE, judge, one)))
    return tuple(found)


def _duplicates(
    around: Surroundings, column: str, total: int, earlier: tuple[str, ...], *, near: bool
) -> _Compare:
    check = around.config.quality.near_duplicates if near else None

    def compare(one: Round, rounds: tuple[str, ...]) -> None:
        search = DuplicateSearch(around.place, (*earlier, *rounds), bucket_count(total), check, column)
        refuse_duplicates(STAGE, search, one)

    return DUPLICATES_FOLDER, compare
