"""Synthesis: LLMs write search queries for documents of the corpus.

The seed documents and who writes for them are put on disk first. Each generator then streams its own through
an actor pool, one generator after another, in shards that are committed exactly once; see engines.shards.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.data import SynthesisConfig
from embedloom.config.resources import PoolConfig
from embedloom.engines.protocol import EngineFactory
from embedloom.engines.shards import run_sharded
from embedloom.engines.vllm_engine import VLLMEngine
from embedloom.errors import ConfigError, StageError
from embedloom.progress import note
from embedloom.storage import Place
from embedloom.synthesis.prompt import Prompt, load_prompt
from embedloom.synthesis.selection import work_folder, write_work
from embedloom.synthesis.worker import COUNT_KEYS, PAIRS_FOLDER, REJECTS_FOLDER, Recipe, SynthesisWorker

STAGE = "synthesize"
SEED_DOCUMENTS = "documents/train"  # held-out modules are never shown to an LLM


def synthesize(
    config: SynthesisConfig,
    seed: int,
    corpus: Artefact,
    pool: PoolConfig,
    out: ArtefactWriter,
    model_folders: dict[str, Path],
    engine_factory: EngineFactory = VLLMEngine,
) -> Artefact:
    """Write queries for ``config.documents`` documents of the train split and commit the pairs.

    Args:
        config: generators, prompt, sampling, limits.
        seed: of the run; decides the documents and every row's sampling.
        corpus: artefact with ``documents/train``.
        pool: actors of a generator and what each reserves.
        out: writer of the artefact; an interrupted one continues.
        model_folders: local model folder per ``generators[].model``.
        engine_factory: builds the engine inside an actor.

    Returns:
        The artefact with ``pairs/`` and ``rejects/``.

    Raises:
        ConfigError: a malformed prompt, or a generator given twice.
        StageError: a generator's rejects exceed ``config.max_reject_share``, or an engine failed.
    """
    prompt = load_prompt(config.prompt)
    prompt.templates(config.queries_per_document)
    names = _generator_names(config)
    weights = [generator.weight for generator in config.generators]
    documents = write_work(corpus.place, SEED_DOCUMENTS, out.place, config.documents, weights, seed)
    _note_shortage(sum(documents), config.documents)
    per_generator: dict[str, dict[str, Any]] = {}
    first_part = 0
    for number, (name, count) in enumerate(zip(names, documents, strict=True)):
        if not count:  # its weight is below one document
            continue
        recipe = Recipe(name, seed, prompt, config)
        parts = run_sharded(
            stage=f"{STAGE} {name}" if len(names) > 1 else STAGE,
            source=out.place,
            source_folder=work_folder(number),
            output=out.place,
            done_folder=PAIRS_FOLDER,
            shard_rows=config.shard_rows,
            worker=SynthesisWorker,
            worker_arguments={
                "engine_factory": engine_factory,
                **_worker_arguments(config, pool, model_folders[name], recipe),
            },
            pool=pool,
            unit="documents",
            first_part=first_part,
        )
        per_generator[name] = _count(out.place, parts)
        _check_rejects(name, per_generator[name], config.max_reject_share)
        first_part += math.ceil(count / config.shard_rows)
    return _commit(out, config, prompt, per_generator)


def _note_shortage(found: int, asked: int) -> None:
    if found < asked:
        note(STAGE, f"the train split has {found:,} documents, {asked:,} are asked for; all are used")


def _commit(
    out: ArtefactWriter, config: SynthesisConfig, prompt: Prompt, per_generator: dict[str, dict[str, Any]]
) -> Artefact:
    details = {"prompt": config.prompt, "prompt_hash": prompt.hash, "generators": per_generator}
    return out.commit(_total(per_generator), details)


def _generator_names(config: SynthesisConfig) -> list[str]:
    names = [generator.model for generator in config.generators]
    for name, times in Counter(names).items():
        if times > 1:
            raise ConfigError(
                f"synthesis.generators: {name!r} stands {times} times; give it once, with the summed weight"
            )
    return names


def _worker_arguments(
    config: SynthesisConfig, pool: PoolConfig, folder: Path, recipe: Recipe
) -> dict[str, Any]:
    engine_arguments = {
        "model_folder": folder,
        "max_model_tokens": config.max_model_tokens,
        "threads": pool.compute_threads,
        "gpu": pool.gpus > 0,
        "tensor_parallel": pool.tensor_parallel,
    }
    return {"engine_arguments": engine_arguments, "recipe": recipe}


def _count(place: Place, parts: list[str]) -> dict[str, Any]:
    """Sums over finished parts, from footers and the reject reasons alone."""
    counts: dict[str, Any] = {"rows": 0, **dict.fromkeys(COUNT_KEYS, 0)}
    reasons: Counter[str] = Counter()
    for part in parts:
        schema, rows = place.parquet_footer(part)
        counts["rows"] += rows
        for key in COUNT_KEYS:
            counts[key] += int(schema.metadata[key.encode()])
        rejects = place.read_table(part.replace(PAIRS_FOLDER, REJECTS_FOLDER, 1), columns=["reason"])
        reasons.update(rejects.column("reason").to_pylist())
    counts["rejects"] = dict(sorted(reasons.items()))
    return counts


def _check_rejects(name: str, counts: dict[str, Any], limit: float) -> None:
    rejected = sum(counts["rejects"].values())
    asked = rejected + counts["rows"]
    if rejected > limit * asked:
        reasons = ", ".join(f"{reason} {number}" for reason, number in counts["rejects"].items())
        raise StageError(
            f"{STAGE}: {name} had {rejected} of {asked} queries refused ({reasons}); "
            f"synthesis.max_reject_share allows a share of {limit:g}"
        )


def _total(per_generator: dict[str, dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {
        key: sum(counts[key] for counts in per_generator.values()) for key in ("rows", *COUNT_KEYS)
    }
    total["tokens"] = total["prompt_tokens"] + total["output_tokens"]
    total["rejects"] = dict(sum((Counter(counts["rejects"]) for counts in per_generator.values()), Counter()))
    total["generators"] = {name: counts["rows"] for name, counts in per_generator.items()}
    return total
