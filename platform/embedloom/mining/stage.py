"""Hard-negative mining: the teacher embeds queries and corpus, exact search finds near misses, a margin selects."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.config.data import MiningConfig
from embedloom.config.resources import PoolConfig
from embedloom.encoder.sidecars import derive_contract
from embedloom.engines.shards import run_sharded
from embedloom.errors import ConfigError, StageError
from embedloom.instructions import CONTRACT_FILE, DEFAULT_INSTRUCTIONS, PromptContract
from embedloom.mining.queries import INLINE_FOLDER, QUERIES_FOLDER, pair_files, write_queries
from embedloom.mining.worker import (
    AUDIT_FOLDER,
    CANDIDATES_FOLDER,
    DOCUMENT_VECTORS,
    DOCUMENTS_FOLDER,
    EXAMPLES_FOLDER,
    INLINE_VECTORS,
    QUERY_VECTORS,
    REJECTS_FOLDER,
    MiningRules,
    MiningWorker,
)
from embedloom.retrieval.embed import TextColumns, embed_corpus
from embedloom.retrieval.embedder import EncoderSource
from embedloom.storage import Place


def mine(
    config: MiningConfig,
    corpus: Artefact,
    pair_artefacts: list[Artefact],
    teacher_folder: Path,
    pool: PoolConfig,
    out: ArtefactWriter,
) -> Artefact:
    """Mine hard negatives for all training pairs from the corpus's training documents.

    An interrupted run continues with the shards that are missing; the result does not depend on the number of
    actors. Pairs that bring their own negatives (classification) keep those, scored by the teacher.

    Args:
        config: the mining section.
        corpus: artefact with ``documents/train`` and, if it has natural pairs, ``pairs/train``.
        pair_artefacts: further artefacts with ``pairs``.
        teacher_folder: model folder of the teacher.
        pool: actors and what each reserves, for embedding and for search.
        out: writer of the mining artefact.

    Raises:
        UserError: no pairs, pair ids that stand twice, a teacher that cannot read as many tokens as asked for.
        StageError: not a single example came out, or a worker failed.
    """
    contract = teacher_contract(config, teacher_folder)
    files = pair_files(corpus, pair_artefacts)
    queries = write_queries(files, (corpus.place, DOCUMENTS_FOLDER), out.place, config.shard_rows)
    tokens = _embed(config, corpus, teacher_folder, contract, pool, out.place, queries["inline"] > 0)
    parts = _search(config, corpus, contract, pool, out.place, queries["inline"] > 0)
    counts = mining_counts(out.place, parts, config.negatives)
    if not counts["rows"]:
        raise StageError(
            f"mining: none of {queries['rows']} pairs became an example; rejects: {counts['rejects']}"
        )
    details = {"teacher": config.teacher, "contract_hash": contract.hash, "pairs": queries["pairs"]}
    return out.commit({**counts, "tokens": sum(tokens.values()), "tokens_by_side": tokens}, details)


def teacher_contract(config: MiningConfig, folder: Path) -> PromptContract:
    """The teacher's own contract with the token limits of the mining section.

    Its instructions change only where the config's differ from the defaults; pairs bring their own in any case.

    Raises:
        ConfigError: a limit above the positions the teacher has.
        DataError: no contract and nothing to derive one from.
    """
    own = PromptContract.load(folder) if (folder / CONTRACT_FILE).is_file() else derive_contract(folder)
    positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    for key in ("max_query_tokens", "max_document_tokens"):
        if positions is not None and getattr(config, key) > positions:
            raise ConfigError(
                f"mining.{key}: {getattr(config, key)} is above the {positions} positions of {config.teacher!r}"
            )
    changes: dict[str, Any] = {
        "max_query_tokens": config.max_query_tokens,
        "max_document_tokens": config.max_document_tokens,
    }
    named = {key: text for key, text in config.instructions.items() if text != DEFAULT_INSTRUCTIONS.get(key)}
    changes["instructions"] = {**own.instructions, **named}
    return own.model_copy(update=changes)


def _embed(
    config: MiningConfig,
    corpus: Artefact,
    teacher: Path,
    contract: PromptContract,
    pool: PoolConfig,
    place: Place,
    inline: bool,
) -> dict[str, int]:
    """Write query, document and inline vectors; tokens by side."""
    common: dict[str, Any] = {
        "output": place, "model": EncoderSource(config.teacher, teacher, contract), "pool": pool,
        "shard_rows": config.shard_rows,
    }  # fmt: skip
    asked = embed_corpus(
        stage="mine queries", source=place, source_folder=QUERIES_FOLDER, done_folder=QUERY_VECTORS, side="query",
        columns=TextColumns(texts=("text",), instruction="instruction"), **common,
    )  # fmt: skip
    documents = embed_corpus(
        stage="mine documents", source=corpus.place, source_folder=DOCUMENTS_FOLDER, done_folder=DOCUMENT_VECTORS, side="document", **common,
    )  # fmt: skip
    tokens = {"queries": asked["tokens"], "documents": documents["tokens"]}
    if inline:
        given = embed_corpus(
            stage="mine given texts", source=place, source_folder=INLINE_FOLDER, done_folder=INLINE_VECTORS, side="document",
            columns=TextColumns(texts=("text",)), **common,
        )  # fmt: skip
        tokens["documents"] += given["tokens"]
    return tokens


def _search(
    config: MiningConfig,
    corpus: Artefact,
    contract: PromptContract,
    pool: PoolConfig,
    place: Place,
    inline: bool,
) -> list[str]:
    """Search and select for every part of the queries; names of the parts."""
    rules = MiningRules(
        teacher=config.teacher,
        top_k=config.top_k,
        negatives=config.negatives,
        margin_ratio=config.margin_ratio,
        symmetric_task_types=tuple(contract.symmetric_task_types),
    )
    parts = run_sharded(
        stage="mine",
        source=place,
        source_folder=QUERIES_FOLDER,
        output=place,
        done_folder=CANDIDATES_FOLDER,
        shard_rows=config.shard_rows,
        worker=MiningWorker,
        worker_arguments={"rules": rules, "place": place, "corpus": corpus.place, "has_inline": inline},
        pool=pool,
        unit="queries",
    )
    return [Path(part).name for part in parts]


def mining_counts(place: Place, parts: list[str], negatives: int) -> dict[str, Any]:
    """Counts of a finished mining folder, file by file.

    Args:
        place: the mining artefact's place.
        parts: names of its parts.
        negatives: how many were asked for per example.

    Returns:
        ``rows``, ``rows_by_origin``, ``rejects`` by reason, ``short_negatives`` (examples with fewer than asked
        for), ``removed_by_margin`` (candidates), ``false_negative_share`` (of the top ``negatives`` candidates
        that are no known positives, the share that the margin refused), ``mean_positive_score``.
    """
    totals: Counter[str] = Counter()
    origins: Counter[str] = Counter()
    rejects: Counter[str] = Counter()
    score_sum = 0.0
    for part in parts:
        examples = place.read_table(f"{EXAMPLES_FOLDER}/{part}", ["dataset", "positive_score", "negatives"])
        origins.update(examples.column("dataset").to_pylist())
        score_sum += sum(examples.column("positive_score").to_pylist())
        totals["short_negatives"] += (
            pc.sum(pc.less(pc.list_value_length(examples.column("negatives")), negatives)).as_py() or 0
        )
        rejects.update(place.read_table(f"{REJECTS_FOLDER}/{part}", ["reason"]).column("reason").to_pylist())
        audit = place.read_table(f"{AUDIT_FOLDER}/{part}")
        for key in ("removed_as_positive", "removed_by_margin", "naive", "naive_removed"):
            totals[key] += pc.sum(audit.column(key)).as_py() or 0
    rows = sum(origins.values())
    return {
        "rows": rows,
        "rows_by_origin": dict(sorted(origins.items())),
        "rejects": dict(sorted(rejects.items())),
        "short_negatives": totals["short_negatives"],
        "removed_as_positive": totals["removed_as_positive"],
        "removed_by_margin": totals["removed_by_margin"],
        "false_negative_share": round(totals["naive_removed"] / totals["naive"], 4)
        if totals["naive"]
        else 0.0,
        "mean_positive_score": round(score_sum / rows, 4) if rows else 0.0,
    }
