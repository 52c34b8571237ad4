"""Synthesis: a mix of LLMs writes rows of many families, and every row says where it came from.

    tasks (step one) ─► rows of all families ─► translations of them ─► pairs/, rejects/

Each is a phase: rounds of attempts until the quota of every generator, family and language is met (rounds.py). Rows
and shards are files; the driver holds counts and file names only.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.resources import PoolConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.engines.protocol import EngineFactory
from embedloom.engines.shards import parquet_rows
from embedloom.engines.vllm_engine import VLLMEngine
from embedloom.retrieval.ahead import Ahead
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.storage import Place
from embedloom.synthesis.final import PAIRS_FOLDER, last_places, numbered_parts, write_final
from embedloom.synthesis.guard import guard_file
from embedloom.synthesis.outcome import Written, commit
from embedloom.synthesis.phases import (
    TASKS_FOLDER,
    Surroundings,
    row_phase,
    task_phase,
    translated_last,
    written_first,
)
from embedloom.synthesis.pools import waves
from embedloom.synthesis.prompts_used import used_prompts
from embedloom.synthesis.round_trip_pass import DOCUMENTS_FOLDER
from embedloom.synthesis.rounds import STAGE, Phase, Rounds
from embedloom.synthesis.sampled import measured_diversity
from embedloom.synthesis.selection import RowSource

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
    tasks, rows = _write_all(around)
    files = [f"{PAIRS_FOLDER}/{part.file}" for one in rows for part in one.parts]
    diversity = measured_diversity(STAGE, out.place, files, [one for phase in rows for one in phase.rounds])
    return commit(out, prompts, tasks, rows, diversity, STEPS_FOLDER)


def _write_all(around: Surroundings) -> tuple[list[Written], list[Written]]:
    """Run the phases: step one, if any, and those that write rows."""
    config, place = around.config, around.place
    phase = task_phase(around)
    tasks = [] if phase is None else [_run(phase, place, TASKS_FOLDER, 0)]
    first = sum(len(one.parts) for one in tasks)
    own = tuple((around.corpus, name) for name in around.corpus.names(_CORPUS_PAIRS, ".parquet"))
    pairs = RowSource("pairs", own, same_language=False)
    rows = [_run(row_phase(around, "rows", written_first(config), (), pairs), place, PAIRS_FOLDER, first)]
    if last := translated_last(config):
        done = tuple((place, f"{PAIRS_FOLDER}/{part.file}") for part in rows[0].parts)
        earlier = tuple(one.folder for one in rows[0].rounds)
        pairs = RowSource("pairs", done, same_language=False)
        phase = row_phase(around, "translations", last, earlier, pairs)
        rows.append(_run(phase, place, PAIRS_FOLDER, first + len(rows[0].parts)))
    return tasks, rows


def _run(phase: Phase, place: Place, folder: str, first: int) -> Written:
    """Run a phase to its end and write its rows where they belong."""
    rounds = Rounds(phase)
    rounds.run()
    parts = numbered_parts(place, rounds.rounds, first)
    kept = {cell: counts.rows for cell, counts in rounds.tally.items()}
    last = last_places(STAGE, place, rounds.rounds, phase.quotas, kept)
    write_final(STAGE, place, parts, last, folder)
    return Written(phase.name, phase.quotas, rounds.tally, rounds.rounds, parts)
