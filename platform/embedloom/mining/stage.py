"""Hard-negative mining in two artefacts: candidates of every teacher, and the examples that rules make of them."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.compute.shards import run_here, run_sharded, run_tasks
from embedloom.config.cluster import PoolConfig
from embedloom.config.mining import MiningConfig, Teacher
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS, Side, Templates
from embedloom.core.storage import Place
from embedloom.encoder.registry import NodeModel, open_model
from embedloom.encoder.tokenizer import load_tokenizer, prompt_ids, room_problem
from embedloom.errors import ConfigError, StageError
from embedloom.mining.audit import judge_sample, summed_audit
from embedloom.mining.candidates import DOCUMENTS_FOLDER, Mined, TeacherPass, part_names
from embedloom.mining.examples import (
    AUDIT_FOLDER,
    EXAMPLES_FOLDER,
    FACTS_KEY,
    REJECTS_FOLDER,
    SAMPLE_FOLDER,
    ExampleWorker,
    facts_of,
)
from embedloom.mining.queries import QUERIES_FOLDER, pair_files, write_queries
from embedloom.retrieval.cross_encoder import CrossEncoderSource, PairScorerSource, check_cross_encoder
from embedloom.retrieval.embedder import EmbedderSource, EncoderSource
from embedloom.retrieval.teachers import check_positions, teacher_source
from embedloom.retrieval.vector_files import CUT_COUNTS

# The teachers a mining section names, ready to be opened in actors.


_MANY_PAIRS = 50_000  # a task's process takes longer to start than fewer take


def teacher_sources(config: MiningConfig) -> list[EmbedderSource]:
    """One source per teacher, with the section's token limits and changed instructions.

    Raises:
        ConfigError: a limit above the positions a teacher has, or settings that do not fit it; the teacher is named.
        DataError: no such model.
    """
    return [_source(config, teacher, f"mining.teachers.{n}") for n, teacher in enumerate(config.teachers)]


def judge_source(config: MiningConfig) -> EmbedderSource | None:
    """The judge of the audit, if there is one; see ``teacher_sources``."""
    return None if config.audit.judge is None else _source(config, config.audit.judge, "mining.audit.judge")


def rescoring_source(config: MiningConfig) -> PairScorerSource:
    """What opens the cross-encoder of the rescoring section; a model of the hub is fetched here.

    Raises:
        ConfigError: no such section, or a limit above the model's positions.
        DataError: no such model, or no cross-encoder.
    """
    section = config.rescoring
    if section is None:
        raise ConfigError("mining.rescoring: the section is missing")
    model = open_model(NodeModel.of(section.model, section.trust_remote_code))
    check_cross_encoder(model.path)
    try:
        check_positions(section.model, model, {"max_tokens": section.max_tokens})
    except ConfigError as error:
        raise ConfigError(f"mining.rescoring: {error}") from error
    return CrossEncoderSource(
        name=section.model,
        folder=model.travels,
        templates=Templates(query=section.query_template, instructions=config.instructions),
        max_tokens=section.max_tokens,
        batch_size=section.batch_size,
        dtype=section.dtype,
    )


def _source(config: MiningConfig, teacher: Teacher, where: str) -> EmbedderSource:
    # Instructions change only where the config's differ from the defaults; pairs bring their own in any case.
    named = {key: text for key, text in config.instructions.items() if text != DEFAULT_INSTRUCTIONS.get(key)}
    try:
        return teacher_source(
            teacher,
            max_query_tokens=config.max_query_tokens,
            max_document_tokens=config.max_document_tokens,
            instructions=named,
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def room_check(teachers: Sequence[EmbedderSource]) -> Callable[[str, Side, str, str], str | None]:
    """What says why one of the teachers would see next to nothing of a text (side, task type, instruction), if so.

    Known of teachers that our encoder runs; sentence-transformers' refuse such a text when they meet it.
    """
    encoders = [
        (source.name, load_tokenizer(open_model(source.folder).transformer), source.contract)
        for source in teachers
        if isinstance(source, EncoderSource) and source.contract is not None
    ]

    @lru_cache(maxsize=4096)
    def problems(side: Side, task_type: str, instruction: str) -> list[tuple[int, str]]:
        found = []
        for number, (name, tokenizer, contract) in enumerate(encoders):
            prompt = contract.format("", side, task_type, instruction)
            problem = room_problem(tokenizer, contract, side, prompt)
            if problem is not None:
                found.append((number, f"teacher {name!r}: {problem}"))
        return found

    def too_long(text: str, side: Side, task_type: str, instruction: str) -> str | None:
        for number, problem in problems(side, task_type, instruction):
            _, tokenizer, contract = encoders[number]
            whole = prompt_ids(tokenizer, contract.format(text, side, task_type, instruction))
            if len(whole) > contract.max_tokens(side):
                return problem
        return None

    return too_long


def mine(
    config: MiningConfig,
    corpus: Artefact,
    pair_artefacts: list[Artefact],
    teachers: list[EmbedderSource],
    pool: PoolConfig,
    out: ArtefactWriter,
    ahead: Place | None = None,
) -> Artefact:
    """Find and keep the top candidates of every training pair, for every teacher.

    An interrupted run continues with the parts that are missing; the result does not depend on the number of
    actors.

    Args:
        config: the mining section.
        corpus: artefact with ``documents/train`` and, if it has natural pairs, ``pairs/train``.
        pair_artefacts: further artefacts with ``pairs``.
        teachers: one source per ``config.teachers``.
        pool: actors and what each reserves, for embedding and for search.
        out: writer of the mining artefact.
        ahead: query vectors made while the rows were written; see ``retrieval/embed.py``.

    Raises:
        UserError: no pairs, pair ids that stand twice, vectors that do not fit each other.
        StageError: a worker failed.
    """
    queries = _gathered(pair_files(corpus, pair_artefacts), corpus, teachers, config.shard_rows, out.place)
    parts = part_names(queries)
    tokens: Counter[str] = Counter()
    hashes = []
    for number, source in enumerate(teachers):
        one = TeacherPass(number, source, config, out.place, corpus.place, pool, ahead)
        tokens.update(one.embed(queries))
        hashes.append(one.search(queries, parts))
    cut = {key: tokens.pop(key) for key in CUT_COUNTS if key in tokens}
    counts = {
        "rows": queries["rows"],
        "rejects": queries["rejects"],
        **({"cleaned": queries["cleaned"]} if queries.get("cleaned") else {}),
        "tokens": sum(tokens.values()),
        "tokens_by_side": dict(tokens),
        **cut,
        "top_k": config.top_k,
    }
    details = {
        "teachers": [teacher.model for teacher in config.teachers],
        "contract_hashes": hashes,
        "pairs": queries["pairs"],
        "parts": queries["parts"],
        "given": queries["given"],
    }
    if trusted := [teacher.model for teacher in config.teachers if teacher.trust_remote_code]:
        details["trust_remote_code"] = trusted
    return out.commit(counts, details)


def _gathered(
    files: list[tuple[Place, str]],
    corpus: Artefact,
    teachers: list[EmbedderSource],
    shard_rows: int,
    out: Place,
) -> dict[str, Any]:
    """``write_queries``; of many pairs the driver holds none, a task gathers them."""
    many = sum(place.parquet_footer(name)[1] for place, name in files) > _MANY_PAIRS
    tasks = run_tasks if many else run_here
    documents = (corpus.place, DOCUMENTS_FOLDER)
    (queries,) = tasks("mine", _gather, [files], documents, out, shard_rows, teachers, cpus=1.0)
    return dict(queries)


def _gather(
    files: list[tuple[Place, str]],
    documents: tuple[Place, str],
    out: Place,
    shard_rows: int,
    teachers: list[EmbedderSource],
) -> dict[str, Any]:
    return write_queries(files, documents, out, shard_rows, room_check(teachers))


def build_examples(
    config: MiningConfig,
    mined: Artefact,
    corpus: Artefact,
    judge: EmbedderSource | None,
    pool: PoolConfig,
    out: ArtefactWriter,
    rescored: Artefact | None = None,
) -> Artefact:
    """Apply the selection rules to mined candidates and audit what they did.

    Args:
        config: the mining section.
        mined: artefact of ``mine``.
        corpus: the corpus it was mined from.
        judge: second teacher that looks at a sample, or None.
        pool: actors and what each reserves.
        out: writer of the examples artefact: ``examples/``, ``audit/``, ``rejects/``, ``sample/``.
        rescored: artefact of ``rescore``, whose scores the rules read in place of the teachers'.

    Raises:
        StageError: not a single example came out, or a worker failed.
    """
    details = mined.manifest["details"]
    scored = Mined.of(mined, corpus) if rescored is None else Mined.of(mined, corpus).rescored(rescored)
    done = run_sharded(
        stage="examples",
        source=mined.place,
        source_folder=QUERIES_FOLDER,
        output=out.place,
        done_folder=EXAMPLES_FOLDER,
        shard_rows=max(1, mined.counts["rows"]),
        worker=ExampleWorker,
        worker_arguments={"rules": config.selection, "mined": scored},
        pool=pool,
        unit="queries",
        by_file=True,
    )
    names = [Path(part).name for part in done]
    facts = [part_facts(out.place, name, config.selection.negatives) for name in names]
    counts = example_counts(facts)
    if not counts["rows"]:
        raise StageError(
            f"mining: none of {mined.counts['rows']} queries became an example; rejects: {counts['rejects']}"
        )
    audit: dict[str, Any] = summed_audit((one["audit"] for one in facts), config.selection.negatives)
    if judge is not None:
        sample = draw_sample(out.place, names, config.audit.sample)
        audit["judged"] = judge_sample(sample, judge, out.place, pool, config.selection.margin_ratio)
    counts["false_negative_share"] = audit["total"]["naive"]["share"]
    scored_by = details["teachers"] if rescored is None else [rescored.manifest["details"]["model"]]
    return out.commit(counts, {"teachers": details["teachers"], "scored_by": scored_by, "audit": audit})


def part_facts(place: Place, part: str, negatives: int) -> dict[str, Any]:
    """What a finished part counts, out of its footers; of a part that an earlier version wrote, out of its rows."""
    found: dict[str, Any] = {}
    for folder in (EXAMPLES_FOLDER, REJECTS_FOLDER, AUDIT_FOLDER):
        metadata = place.parquet_footer(f"{folder}/{part}")[0].metadata or {}
        if FACTS_KEY not in metadata:
            tables = [
                place.read_table(f"{name}/{part}") for name in (EXAMPLES_FOLDER, REJECTS_FOLDER, AUDIT_FOLDER)
            ]
            return facts_of(tables[0], tables[1], tables[2], negatives)
        found |= json.loads(metadata[FACTS_KEY])
    return found


def example_counts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of finished examples.

    Args:
        facts: ``facts_of`` each part, in order.

    Returns:
        ``rows``, ``rows_by_origin``, ``rejects`` by reason, ``short_negatives`` (examples with fewer than asked
        for), ``mean_positive_score``.
    """
    origins: Counter[str] = Counter()
    rejects: Counter[str] = Counter()
    for one in facts:
        origins.update(one["origins"])
        rejects.update(one["rejects"])
    rows = sum(origins.values())
    score_sum = sum(one["score_sum"] for one in facts)
    return {
        "rows": rows,
        "rows_by_origin": dict(sorted(origins.items())),
        "rejects": dict(sorted(rejects.items())),
        "short_negatives": sum(one["short"] for one in facts),
        "mean_positive_score": round(score_sum / rows, 4) if rows else 0.0,
    }


def draw_sample(place: Place, parts: Sequence[str], queries: int) -> pa.Table:
    """The rows of the ``queries`` queries with the smallest draw, which is a hash of the query's id.

    Reads the draws of all parts, and the texts of those parts alone that hold one of the smallest.

    Raises:
        StageError: no part has a row.
    """
    kept = np.empty(0, dtype=np.uint64)
    holding: dict[int, list[str]] = {}
    for part in parts:
        draws = np.unique(place.read_table(f"{SAMPLE_FOLDER}/{part}", ["draw"]).column("draw").to_numpy())
        kept = np.union1d(kept, draws)[:queries]
        for draw in draws[np.isin(draws, kept)].tolist():
            holding.setdefault(draw, []).append(part)
        holding = {draw: holding[draw] for draw in kept.tolist()}
    holders = sorted({part for own in holding.values() for part in own})
    tables = [place.read_table(f"{SAMPLE_FOLDER}/{part}") for part in holders]
    chosen = [table.filter(pc.is_in(table.column("draw"), value_set=pa.array(kept))) for table in tables]
    if not chosen:
        raise StageError("mining.audit: no query to judge")
    return pa.concat_tables(chosen).sort_by([("draw", "ascending"), ("kind", "ascending")])
