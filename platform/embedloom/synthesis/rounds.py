"""The phases of the stage and their rounds: plan, attempts, answers, comparison with other rows, counting, until quotas are met."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from embedloom.compute.endpoint import EndpointWorker, Ledger
from embedloom.compute.generation import (
    EngineFactory,
    GenerationWorker,
    generation_arguments,
    shards_in_flight,
)
from embedloom.compute.shards import Handling, Link, Starts, run_sharded, run_tasks
from embedloom.config.cluster import PoolConfig
from embedloom.config.synthesis import (
    EndpointConfig,
    EngineOptions,
    FamilyConfig,
    SynthesisConfig,
    TranslationConfig,
)
from embedloom.core.progress import note
from embedloom.core.storage import Place
from embedloom.errors import StageError
from embedloom.retrieval.embed import Ahead
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.synthesis.attempts import (
    ATTEMPTS_FILE,
    RoundWork,
    RowSource,
    Stretch,
    attempts_folder,
    write_attempts,
)
from embedloom.synthesis.duplicates import DUPLICATES_FOLDER, DuplicateSearch, bucket_count, refuse_duplicates
from embedloom.synthesis.families.registry import FAMILIES
from embedloom.synthesis.judge import JUDGE_FOLDER, Judge, Served, refuse_ungraded
from embedloom.synthesis.prices import Placed, judge_pool, waves
from embedloom.synthesis.prompts_used import UsedPrompts, languages_of, task_families, writers
from embedloom.synthesis.quotas import Cell, Standing, Tally, check_limits, next_attempts, quotas, stamped
from embedloom.synthesis.refusals import ROWS_FOLDER, Round, count_parts, parts_together, sort_refusals
from embedloom.synthesis.round_trip import DOCUMENTS_FOLDER, ROUND_TRIP_FOLDER, RoundTrip, refuse_unfound
from embedloom.synthesis.rows import RowMaker, TaskMaker

# One phase of the stage: rounds of plan, attempts, answers, comparison with other rows and counting, until quotas are met.
#
# Every step leaves a file that says it is done, and what it does follows from the files before it; so a run that was
# killed anywhere goes on from there and ends with the same rows.


STAGE = "synthesize"
_PLAN_FILE = "plan.json"
_COUNTS_FILE = "counts.json"
ROUND_FILES = (_PLAN_FILE, _COUNTS_FILE)
_NO_ACTORS = PoolConfig()
ANSWERS_FOLDER = "answers"  # of a round: what endpoints answer, as it comes
MONEY_FOLDER = "steps/money"  # below it a folder for each endpoint


@dataclass(frozen=True)
class Phase:
    """What one phase writes and with what.

    Attributes:
        name: folder below ``steps/``.
        quotas: rows per cell.
        rows_per_attempt: per family key.
        maker: of a generator; of "" for families that ask none.
        work: everything of a RoundWork but what the rounds decide.
        compare: passes over a finished round's rows, in order, as (folder, function).
        served: how a generator's answers for the round in a folder are had.
        ahead: embeds rows while others are still being written; None: mining does.
    """

    name: str
    config: SynthesisConfig
    place: Place
    pool: PoolConfig
    quotas: Mapping[Cell, int]
    families: Mapping[str, FamilyConfig]
    rows_per_attempt: Mapping[str, int]
    maker: Callable[[str], RowMaker]
    work: Callable[[tuple[Stretch, ...], str, Mapping[str, Any]], RoundWork]
    compare: tuple[tuple[str, Callable[[Round, tuple[str, ...]], None]], ...]
    served: Callable[[Placed, str], Served]
    extracting: frozenset[str] = frozenset()
    ahead: Ahead | None = None


class Rounds:
    """Runs a phase; see the module."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._place = phase.place
        self._standing = {cell: Standing(quota) for cell, quota in phase.quotas.items()}
        self._offsets: Mapping[str, Any] = {}
        self._exhausted: set[str] = set()
        self.tally = Tally()
        self.rounds: list[Round] = []

    @property
    def offsets(self) -> Mapping[str, Any]:
        """Places of documents or pairs used so far, by family and language."""
        return self._offsets

    def run(self) -> list[Round]:
        """Rounds until every quota is met.

        Raises:
            StageError: a cell reached its limit of attempts, or an engine failed.
        """
        while stretches := self._planned(len(self.rounds)):
            folder = self._folder(len(self.rounds))
            passes = tuple(name for name, _ in self._phase.compare)
            one = Round(folder, passes, parts_together(self._phase.config.shard_rows))
            if not self._place.exists(f"{folder}/{_COUNTS_FILE}"):
                self._build(one, stretches)
            self._take_in(one)
        return self.rounds

    def _folder(self, number: int) -> str:
        return f"steps/{self._phase.name}/round-{number:03d}"

    def _planned(self, number: int) -> tuple[Stretch, ...]:
        """What this round asks of each cell: its plan file, written before anything runs."""
        name = f"{self._folder(number)}/{_PLAN_FILE}"
        if self._place.exists(name):
            return tuple(
                Stretch(Cell(one["family"], one["generator"], one["language"]), one["start"], one["stop"])
                for one in self._place.read_json(name)["stretches"]
            )
        phase = self._phase
        limits = {
            key: math.inf if key in phase.extracting else phase.config.max_attempts_per_row
            for key in phase.families
        }
        reasons = {cell: counts.rejects for cell, counts in self.tally.items()}
        check_limits(self._standing, phase.rows_per_attempt, limits, reasons, self._exhausted)
        found = []
        for cell, standing in self._standing.items():
            more = next_attempts(
                standing,
                phase.rows_per_attempt[cell.family],
                limits[cell.family],
                phase.config.expected_acceptance,
            )
            if more:
                found.append(Stretch(cell, standing.attempts, standing.attempts + more))
        if found:
            plain = [
                {"family": s.cell.family, "generator": s.cell.generator, "language": s.cell.language,
                 "start": s.start, "stop": s.stop}
                for s in found
            ]  # fmt: skip
            self._place.write_json(name, {"stretches": plain})
        return tuple(found)

    def _build(self, one: Round, stretches: tuple[Stretch, ...]) -> None:
        written = self._attempts(one, stretches)
        self._answer(one, written["attempts"])
        earlier = tuple(known.folder for known in self.rounds)
        for name, compare in self._phase.compare:
            compare(one, (*earlier, one.folder))
            sort_refusals(STAGE, self._place, one, name)
        tally = Tally()
        for part in run_tasks(STAGE, count_parts, one.groups(self._place), one, self._place):
            tally.merge(part)
        self._place.write_json(f"{one.folder}/{_COUNTS_FILE}", {"cells": tally.plain()})

    def _attempts(self, one: Round, stretches: tuple[Stretch, ...]) -> dict[str, Any]:
        if self._place.exists(f"{one.folder}/{ATTEMPTS_FILE}"):
            return self._place.read_json(f"{one.folder}/{ATTEMPTS_FILE}")
        work = self._phase.work(stretches, one.folder, self._offsets)
        (written,) = run_tasks(STAGE, write_attempts, [work], cpus=1.0)
        return written

    def _take_in(self, one: Round) -> None:
        """Add a finished round to where the cells stand."""
        tally = Tally.read(self._place.read_json(f"{one.folder}/{_COUNTS_FILE}")["cells"])
        written = self._place.read_json(f"{one.folder}/{ATTEMPTS_FILE}")
        self._offsets = written["offsets"]
        self._exhausted.update(written["exhausted"])
        self.tally.merge(tally)
        self.rounds.append(one)
        for stretch in self._planned(len(self.rounds) - 1):
            counts = self.tally.of(stretch.cell)
            quota = self._phase.quotas.get(stretch.cell, 0)  # none where rows were lowered since
            self._standing[stretch.cell] = Standing(quota, stretch.stop, counts.asked, counts.rows)
        missing = sum(standing.deficit for standing in self._standing.values())
        if missing:
            kept = sum(standing.quota for standing in self._standing.values()) - missing
            note(f"{STAGE} {self._phase.name}", f"{kept:,} rows kept, {missing:,} still to write")

    def _answer(self, one: Round, attempts: Mapping[str, int]) -> None:
        """Run every generator over its attempts, side by side where the profile has room."""
        phase = self._phase
        shard_rows = phase.config.shard_rows
        names = [generator.model for generator in phase.config.generators]
        order = [name for name in (*names, "") if attempts.get(name)]
        first, firsts = 0, {}
        for name in order:
            firsts[name] = first
            first += math.ceil(attempts[name] / shard_rows)
        run_token = uuid4().hex
        for wave in waves([g for g in phase.config.generators if g.model in firsts], phase.pool):
            with ThreadPoolExecutor(len(wave)) as threads:
                failed: list[BaseException] = []
                jobs = [
                    threads.submit(
                        self._run_generator, one, placed, firsts[placed.generator.model], run_token, failed
                    )
                    for placed in wave
                ]
                for job in jobs:
                    job.result()
        if "" in firsts:
            extract = Handling(finish=phase.maker("").extract, links=self._links(one))
            self._run_sharded(one, "", firsts[""], None, _NO_ACTORS, {}, extract)

    def _run_generator(
        self, one: Round, placed: Placed, first: int, run_token: str, failed: list[BaseException]
    ) -> None:
        """One generator's shards; its speed is noted for those written now."""
        name = placed.generator.model
        here = self._place.child(one.folder)
        before = set(here.names(ROWS_FOLDER, ".parquet"))
        started = time.monotonic()

        def watch() -> None:
            if failed:
                raise StageError(f"stopped, because another generator failed: {failed[0]}")

        maker = self._phase.maker(name)
        served = self._phase.served(placed, one.folder)
        handling = Handling(
            weights=served.weights,
            prepare=maker.prepare,
            finish=maker.finish,
            in_flight=served.in_flight,
            starts=Starts(here.child("starts"), f"{run_token}-{first}"),
            watch=watch,
            links=self._links(one),
        )
        try:
            parts = self._run_sharded(
                one, name, first, served.worker, placed.pool, served.arguments, handling
            )
        except BaseException as error:
            failed.append(error)
            raise failed[0] from None
        new = [part for part in parts if part not in before]
        if new:
            tokens = sum(counts.output_tokens for part in new for counts in stamped(here, part).values())
            speed = {"generator": name, "output_tokens": tokens, "seconds": time.monotonic() - started}
            self._place.write_json(f"steps/speed/{uuid4().hex}.json", speed)

    def _links(self, one: Round) -> tuple[Link, ...]:
        ahead = self._phase.ahead
        return () if ahead is None else ahead.links(self._place, f"{one.folder}/{ROWS_FOLDER}", one.folder)

    def _run_sharded(
        self, one: Round, name: str, first: int, worker: Any, pool: PoolConfig, arguments: dict[str, Any],
        handling: Handling,
    ) -> list[str]:  # fmt: skip
        names = tuple(generator.model for generator in self._phase.config.generators)
        several = f" {name or 'existing rows'}" if len(names) > 1 or not name else ""
        return run_sharded(
            stage=f"{STAGE} {self._phase.name}{several}",
            source=self._place,
            source_folder=attempts_folder(one.folder, names, name),
            output=self._place.child(one.folder),
            done_folder=ROWS_FOLDER,
            shard_rows=self._phase.config.shard_rows,
            worker=worker,
            worker_arguments=arguments,
            pool=pool,
            unit="attempts",
            first_part=first,
            handling=handling,
        )


# The phases of a section: which quotas, prompts, sources and comparisons each has.


TASKS_FOLDER = "tasks"
TASK_LANGUAGE = "eng"  # of task sentences, which become training instructions
_MOST_SHARDS = 16  # that one actor asks an endpoint for at once
_Compare = tuple[str, Callable[[Round, tuple[str, ...]], None]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A model that writes or grades; ``key`` names its folders, ``where`` its config key."""

    name: str
    options: EngineOptions
    endpoint: EndpointConfig | None
    key: str
    where: str


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

    def served(self, model: Asked, pool: PoolConfig, answers: str) -> Served:
        """How a model's answers are had; of an endpoint they are kept as they come, in the folder ``answers``."""
        options = model.options.for_model(model.name)
        if model.endpoint is None:
            arguments = generation_arguments(self.models[model.name], options, pool, self.engine_factory)
            in_flight = shards_in_flight(model.options, pool)
            return Served(GenerationWorker, arguments, (arguments["model"],), in_flight)
        ledger = Ledger(self.place, answers, f"{MONEY_FOLDER}/{model.key}", f"{model.where}.endpoint")
        arguments = {"endpoint": model.endpoint, "options": options, "ledger": ledger}
        # While the last answers of a shard are waited for, others fill the connections.
        shards = 1 + math.ceil(model.endpoint.max_concurrency / self.config.shard_rows)
        return Served(EndpointWorker, arguments, (), min(shards, _MOST_SHARDS))

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

    def served(placed: Placed, folder: str) -> Served:
        generator, number = placed.generator, config.generators.index(placed.generator)
        asked = Asked(
            generator.model, generator.engine, generator.endpoint, f"generator-{number}",
            f"synthesis.generators.{number}",
        )  # fmt: skip
        return around.served(asked, placed.pool, f"{folder}/{ANSWERS_FOLDER}")

    return {
        "config": config, "place": around.place, "pool": around.pool, "quotas": cells, "families": families,
        "work": work, "served": served,
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
        asked = Asked(
            quality.judge.model, next(own, EngineOptions()), quality.judge.endpoint, "judge", "synthesis.quality.judge"
        )  # fmt: skip
        pool = judge_pool(quality.judge, around.pool)
        judge = Judge(
            around.place, quality.judge, around.prompts.judge, pool, around.config.shard_rows,
            lambda folder: around.served(asked, pool, folder),
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
