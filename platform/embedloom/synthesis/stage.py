"""The synthesis stage: a mix of LLMs writes rows of many families; quotas are met round by round, then the artefact is written."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.compute.endpoint import money_spent
from embedloom.compute.generation import EngineFactory
from embedloom.compute.shards import parquet_rows, run_tasks
from embedloom.compute.vllm_engine import VLLMEngine
from embedloom.config.cluster import PoolConfig
from embedloom.config.mining import Teacher
from embedloom.config.synthesis import SynthesisConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import SCHEMAS, check_table, table_from_rows
from embedloom.core.storage import Place
from embedloom.encoder.registry import NodeModel
from embedloom.retrieval.embed import Ahead
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.retrieval.teachers import teacher_source
from embedloom.synthesis.attempts import RowSource
from embedloom.synthesis.carried import can_carry, carry_accounts, carry_round
from embedloom.synthesis.checks import guard_file
from embedloom.synthesis.diversity import measured_diversity
from embedloom.synthesis.prices import waves
from embedloom.synthesis.prompts_used import UsedPrompts, local_models, used_prompts
from embedloom.synthesis.quotas import Cell, Tally
from embedloom.synthesis.refusals import Round, refusals_of, surviving
from embedloom.synthesis.round_trip import DOCUMENTS_FOLDER
from embedloom.synthesis.rounds import (
    MONEY_FOLDER,
    ROUND_FILES,
    STAGE,
    TASKS_FOLDER,
    Phase,
    Rounds,
    Surroundings,
    row_phase,
    task_phase,
    translated_last,
    written_first,
)
from embedloom.synthesis.rows import REJECTS_FOLDER

# The models a section names: generators, judge and the round trip's teacher, ready to be opened in actors.


def model_sources(config: SynthesisConfig) -> dict[str, Callable[[], Path]]:
    """Per model what gives its local folder on the machine where it is called; nothing is fetched yet."""
    return {name: NodeModel(name).folder for name in local_models(config)}


def round_trip_teacher(config: SynthesisConfig, teachers: Sequence[Teacher]) -> EmbedderSource | None:
    """The first mining teacher, where the section checks rows with it."""
    return teacher_source(teachers[0]) if config.quality.round_trip else None


# From the rounds' rows to the artefact's: the first rows of each cell up to its quota, and everything refused.


PAIRS_FOLDER = "pairs"
_CELL = ["family", "generator", "lang"]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a round and the number its rows get in the artefact."""

    round: Round
    name: str
    number: int

    @property
    def file(self) -> str:
        """Name in the artefact's folders."""
        return f"part-{self.number:06d}.parquet"


def numbered_parts(place: Place, rounds: Sequence[Round], first: int = 0) -> list[Part]:
    """All parts of some rounds, in order."""
    named = [(one, name) for one in rounds for name in one.parts(place)]
    return [Part(one, name, first + number) for number, (one, name) in enumerate(named)]


def last_places(
    stage: str, place: Place, rounds: Sequence[Round], quotas: Mapping[Cell, int], kept: Mapping[Cell, int]
) -> dict[Cell, tuple[int, int]]:
    """(ordinal, number) of the last row that each cell with too many rows keeps."""
    wanted = {cell: quotas.get(cell, 0) for cell, rows in kept.items() if rows > quotas.get(cell, 0)}
    if not wanted:
        return {}
    (found,) = run_tasks(stage, _last_places, [wanted], tuple(rounds), place, cpus=1.0)
    return found


def _last_places(
    wanted: Mapping[Cell, int], rounds: Sequence[Round], place: Place
) -> dict[Cell, tuple[int, int]]:
    """Sixteen bytes a row of the crowded cells; runs in a task."""
    places: dict[Cell, list[Any]] = {cell: [] for cell in wanted}
    for one in rounds:
        for group in one.groups(place):
            refused = refusals_of(place, one, group)
            for part in group:
                rows = surviving(one.rows(place, part, ["id", *_CELL, "ordinal", "number"]), refused[part])
                for cell, table in by_cell(rows).items():
                    if cell in places:
                        columns = [table.column(name).to_numpy() for name in ("ordinal", "number")]
                        places[cell].append(np.stack(columns, axis=1))
    last: dict[Cell, tuple[int, int]] = {}
    for cell, found in places.items():
        if not wanted[cell]:  # its quota was lowered to nothing after rows had been written
            last[cell] = (-1, -1)
            continue
        rows_of = np.concatenate(found)
        ordered = rows_of[np.lexsort((rows_of[:, 1], rows_of[:, 0]))]
        ordinal, number = ordered[wanted[cell] - 1]
        last[cell] = (int(ordinal), int(number))
    return last


def by_cell(rows: pa.Table) -> dict[Cell, pa.Table]:
    """Rows by cell."""
    cells = [
        Cell(family, generator or "", language)
        for family, generator, language in zip(
            *(rows.column(name).to_pylist() for name in _CELL), strict=True
        )
    ]
    return {cell: rows.filter(pa.array([one == cell for one in cells], pa.bool_())) for cell in set(cells)}


def write_final(
    stage: str,
    place: Place,
    parts: Sequence[Part],
    last: Mapping[Cell, tuple[int, int]],
    folder: str = PAIRS_FOLDER,
) -> None:
    """Write ``pairs/`` (or another folder) and ``rejects/`` of the artefact, part by part; finished ones are kept."""
    done = set(place.names(folder, ".parquet"))
    todo = [part for part in parts if f"{folder}/{part.file}" not in done]
    step = todo[0].round.parts_together if todo else 1
    groups = [todo[start : start + step] for start in range(0, len(todo), step)]
    for _ in run_tasks(stage, _write_parts, groups, dict(last), folder, place):
        pass


def _write_parts(
    parts: Sequence[Part], last: Mapping[Cell, tuple[int, int]], folder: str, place: Place
) -> None:
    for one in {part.round.folder: part.round for part in parts}.values():
        here = [part for part in parts if part.round == one]
        refused = refusals_of(place, one, [part.name for part in here])
        for part in here:
            _write_part(part, refused[part.name], last, folder, place)


def _write_part(
    part: Part,
    refused: Mapping[str, tuple[str, str]],
    last: Mapping[Cell, tuple[int, int]],
    folder: str,
    place: Place,
) -> None:
    rows = part.round.rows(place, part.name)
    kept = surviving(rows, refused)
    kept = kept.filter(pa.array([_within(row, last) for row in kept.select([*_CELL, "ordinal", "number"]).to_pylist()], pa.bool_()))  # fmt: skip
    rejects = place.read_table(f"{part.round.folder}/{REJECTS_FOLDER}/{part.name}").to_pylist()
    rejects += [
        {"id": i, "reason": reason, "detail": detail} for i, (reason, detail) in sorted(refused.items())
    ]
    place.write_table(f"{REJECTS_FOLDER}/{part.file}", table_from_rows("rejects", rejects))
    if folder == PAIRS_FOLDER:
        kept = check_table(
            "pairs", kept.select(list(SCHEMAS["pairs"].columns)), f"{part.round.folder}/{part.name}"
        )
    place.write_table(f"{folder}/{part.file}", kept.replace_schema_metadata(None))


def _within(row: Mapping[str, Any], last: Mapping[Cell, tuple[int, int]]) -> bool:
    bound = last.get(Cell(row["family"], row["generator"] or "", row["lang"]))
    return bound is None or (row["ordinal"], row["number"]) <= bound


# What the stage says of its rows: counts for the manifest, per generator, family, language and reason.


_SPEED_FOLDER = "steps/speed"


@dataclass(frozen=True)
class Written:
    """A finished phase and the files of its rows."""

    phase: str
    quotas: Mapping[Cell, int]
    tally: Tally
    rounds: list[Round]
    parts: list[Part]
    offsets: Mapping[str, Any]
    first: int  # number of its first part in the artefact

    def cells(self) -> list[dict[str, Any]]:
        """Counts of every cell; rows above the quota are surplus, not kept."""
        found = []
        for one in self.tally.plain():
            cell = Cell(one["family"], one["generator"], one["language"])
            quota = self.quotas.get(cell, 0)
            kept = min(one["rows"], quota)
            found.append({**one, "quota": quota, "rows": kept, "surplus": one["rows"] - kept})
        return found


def commit(
    out: ArtefactWriter,
    config: SynthesisConfig,
    prompts: UsedPrompts,
    tasks: list[Written],
    rows: list[Written],
    diversity: dict[str, Any],
    scratch: str,
) -> Artefact:
    """Write the manifest of these phases, step one and those that wrote rows, and delete the folder of their work."""
    cells = [cell for one in rows for cell in one.cells()]
    task_cells = [cell for one in tasks for cell in one.cells()]
    details = {
        "prompts": prompts.state(),
        "cells": cells,
        "task_cells": task_cells,
        "rounds": {one.phase: len(one.rounds) for one in [*tasks, *rows]},
        # What a later run for other numbers of rows goes on from.
        "phases": {
            one.phase: {"parts": [one.first, one.first + len(one.parts)], "offsets": one.offsets}
            for one in [*tasks, *rows]
        },
        "engines": _speeds(out.place),
        "diversity": diversity,
        **({"money": money} if (money := _money(out.place, config)) else {}),
    }
    return out.commit(totals(cells, task_cells), details, scratch=(scratch,))


def totals(cells: list[dict[str, Any]], task_cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the stage; tokens include those of step one, rows do not."""
    both = [*cells, *task_cells]
    found: dict[str, Any] = {
        name: sum(cell[name] for cell in cells) for name in ("rows", "attempts", "asked", "surplus")
    }
    found["tasks"] = sum(cell["rows"] for cell in task_cells)
    for name in ("prompt_tokens", "output_tokens"):
        found[name] = sum(cell[name] for cell in both)
    found["tokens"] = found["prompt_tokens"] + found["output_tokens"]
    found["rejects"] = _summed(both, lambda cell: cell["rejects"])
    for name, key in (("generators", "generator"), ("families", "family"), ("languages", "language")):
        found[name] = _summed(cells, lambda cell, key=key: {cell[key]: cell["rows"]} if cell[key] else {})
    return found


def _summed(cells: Iterable[dict[str, Any]], counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for cell in cells:
        total.update(counts(cell))
    return dict(sorted(total.items()))


def _money(place: Place, config: SynthesisConfig) -> dict[str, float]:
    """What each endpoint with prices has cost, by model, over all runs."""
    return {name: round(money_spent(place, folder), 6) for name, folder in _accounts(config).items()}


def _accounts(config: SynthesisConfig) -> dict[str, str]:
    """Folder of the account of each endpoint with prices, by what the manifest calls it."""
    asked = {f"generator-{n}": (one.model, one.endpoint) for n, one in enumerate(config.generators)}
    if config.quality.judge is not None:
        asked["judge"] = (f"judge {config.quality.judge.model}", config.quality.judge.endpoint)
    return {
        name: f"{MONEY_FOLDER}/{key}"
        for key, (name, endpoint) in asked.items()
        if endpoint is not None and endpoint.cost(0, 0) is not None
    }


def _speeds(place: Place) -> dict[str, dict[str, float]]:
    """Output tokens and wall seconds per generator, over the runs that went to their end, engine starts included."""
    found: dict[str, dict[str, float]] = {}
    for name in place.names(_SPEED_FOLDER, ".json"):
        run = place.read_json(name)
        one = found.setdefault(run["generator"], {"output_tokens": 0, "seconds": 0.0})
        one["output_tokens"] += run["output_tokens"]
        one["seconds"] += run["seconds"]
    for one in found.values():
        one["seconds"] = round(one["seconds"], 3)
        one["tokens_per_second"] = round(one["output_tokens"] / one["seconds"], 1) if one["seconds"] else 0.0
    return found


# Synthesis: a mix of LLMs writes rows of many families, and every row says where it came from.
#
#     tasks (step one) ─► rows of all families ─► translations of them ─► pairs/, rejects/
#
# Each is a phase: rounds of attempts until the quota of every generator, family and language is met (rounds.py). Rows
# and shards are files; the driver holds counts and file names only.


STEPS_FOLDER = "steps"  # what is in work; gone once the artefact is done
_CORPUS_PAIRS = "pairs/train"


def synthesize(
    config: SynthesisConfig,
    seed: int,
    corpus: Artefact,
    pool: PoolConfig,
    out: ArtefactWriter,
    models: Mapping[str, Callable[[], Path]],
    teacher: EmbedderSource | None = None,
    teacher_pool: PoolConfig | None = None,
    engine_factory: EngineFactory = VLLMEngine,
    ahead: Ahead | None = None,
    previous: Artefact | None = None,
) -> Artefact:
    """Write the rows of every family and commit them.

    Args:
        config: generators, families, sampling, quality, limits.
        seed: of the run; decides what every attempt reads and how its answer is sampled.
        corpus: artefact with ``documents/train`` and, for translation, ``pairs/train``.
        pool: what the stage may take, and the pool of generators that name none.
        out: writer of ``pairs/``, ``rejects/`` and, where families need them, ``tasks/``; may be interrupted.
        models: per ``generators[].model`` and judge, what gives its local folder where it is called.
        teacher: of the round trip check.
        teacher_pool: its actors.
        engine_factory: builds the engine inside an actor.
        ahead: who embeds rows while others are still being written; None: nobody does, mining will.
        previous: finished artefact of the same section but for numbers of rows, whose rows count.

    Raises:
        ConfigError: a malformed prompt, or a pool the profile has no room for.
        DataError: a corpus without what a family starts from.
        StageError: a generator did not fill its quota within the stated limit, or an engine failed for good.
    """
    prompts = used_prompts(config)
    waves(config.generators, pool)  # a pool that never fits is told before anything runs
    parquet_rows(corpus.place, DOCUMENTS_FOLDER)
    around = Surroundings(
        config=config,
        seed=seed,
        corpus=corpus.place,
        place=out.place,
        pool=pool,
        models=models,
        engine_factory=engine_factory,
        prompts=prompts,
        teacher_pool=teacher_pool or pool,
        teacher=teacher,
        ahead=ahead,
        guard=guard_file(STAGE, config.quality.contamination, corpus.place, out.place),
    )
    if previous is not None and can_carry(previous):
        carry_accounts(previous, out.place, _accounts(config))
    else:
        previous = None
    tasks, rows = _write_all(around, previous)
    files = [f"{PAIRS_FOLDER}/{part.file}" for one in rows for part in one.parts]
    diversity = measured_diversity(STAGE, out.place, files, [one for phase in rows for one in phase.rounds])
    return commit(out, config, prompts, tasks, rows, diversity, STEPS_FOLDER)


def _write_all(around: Surroundings, previous: Artefact | None) -> tuple[list[Written], list[Written]]:
    """Run the phases: step one, if any, and those that write rows; those of a finished artefact count."""
    config, place = around.config, around.place
    phase = task_phase(around)
    tasks = [] if phase is None else [_run(phase, place, TASKS_FOLDER, 0, previous)]
    first = sum(len(one.parts) for one in tasks)
    own = tuple((around.corpus, name) for name in around.corpus.names(_CORPUS_PAIRS, ".parquet"))
    pairs = RowSource("pairs", own, same_language=False)
    phase = row_phase(around, "rows", written_first(config), (), pairs)
    rows = [_run(phase, place, PAIRS_FOLDER, first, previous)]
    if last := translated_last(config):
        done = tuple((place, f"{PAIRS_FOLDER}/{part.file}") for part in rows[0].parts)
        earlier = tuple(one.folder for one in rows[0].rounds)
        pairs = RowSource("pairs", done, same_language=False)
        phase = row_phase(around, "translations", last, earlier, pairs)
        rows.append(_run(phase, place, PAIRS_FOLDER, first + len(rows[0].parts), previous))
    return tasks, rows


def _run(phase: Phase, place: Place, folder: str, first: int, previous: Artefact | None) -> Written:
    """Run a phase to its end and write its rows where they belong."""
    if previous is not None:
        carry_round(STAGE, previous, phase.name, list(phase.families), phase.config, place, ROUND_FILES)
    rounds = Rounds(phase)
    rounds.run()
    parts = numbered_parts(place, rounds.rounds, first)
    kept = {cell: counts.rows for cell, counts in rounds.tally.items()}
    last = last_places(STAGE, place, rounds.rounds, phase.quotas, kept)
    write_final(STAGE, place, parts, last, folder)
    return Written(phase.name, phase.quotas, rounds.tally, rounds.rounds, parts, dict(rounds.offsets), first)
