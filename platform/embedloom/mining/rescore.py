"""Scoring the best candidates again with a model that reads query and document together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import pyarrow as pa

from embedloom.compute.shards import Handling, run_sharded
from embedloom.config.cluster import PoolConfig
from embedloom.config.mining import MiningConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.schemas import table_from_rows
from embedloom.errors import ConfigError, DataError
from embedloom.mining.candidates import (
    CANDIDATES_FOLDER,
    SCORES_FOLDER,
    SCORES_SCHEMA,
    Mined,
    negatives_given,
    positive_texts,
)
from embedloom.mining.queries import QUERIES_FOLDER
from embedloom.retrieval.cross_encoder import PairScorerSource
from embedloom.retrieval.embedder import weights_of


def rescore(
    config: MiningConfig,
    mined: Artefact,
    corpus: Artefact,
    scorer: PairScorerSource,
    pool: PoolConfig,
    out: ArtefactWriter,
) -> Artefact:
    """Score every query's best candidates, its positives and its given negatives as pairs of texts.

    The artefact has the tables of one more teacher, part for part those of the queries: ``candidates/``, best first,
    ties by id, and ``positive_scores/``. A part is the unit of work, so batches and scores depend on nothing but the
    mining; an interrupted run continues with the missing parts.

    Args:
        config: the mining section, with ``rescoring``.
        mined: artefact of ``mine``.
        corpus: the corpus it was mined from.
        scorer: what opens the model in each actor.
        pool: actors and what each reserves.
        out: writer of the rescoring artefact.

    Raises:
        ConfigError: no rescoring section.
        DataError: a model that cannot be loaded, or a score that is not finite.
        StageError: a worker failed.
    """
    if config.rescoring is None:
        raise ConfigError("mining.rescoring: the section is missing")
    parts = run_sharded(
        stage=f"rescore, {scorer.name}",
        source=mined.place,
        source_folder=QUERIES_FOLDER,
        output=out.place,
        done_folder=CANDIDATES_FOLDER,
        shard_rows=max(1, mined.counts["rows"]),
        worker=RescoringWorker,
        worker_arguments={"scorer": scorer, "mined": Mined.of(mined, corpus), "top": config.rescoring.top},
        pool=pool,
        unit="queries",
        handling=Handling(weights=weights_of(scorer)),
        by_file=True,
    )
    kept = [out.place.read_table(part, ["document_ids"]).column("document_ids") for part in parts]
    counts = {
        "rows": sum(len(column) for column in kept),
        "candidates": sum(len(chunk.flatten()) for column in kept for chunk in column.chunks),
        "top": config.rescoring.top,
    }
    return out.commit(counts, {"model": scorer.name})


def best_ranked(lists: Sequence[Sequence[str]], top: int) -> list[str]:
    """The first ``top`` of several ranked lists: every list's first, then every list's second, each id once."""
    ranks = dict.fromkeys(one for rank in zip_longest(*lists) for one in rank if one is not None)
    return list(islice(ranks, top))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is scored with one query."""

    row: dict[str, Any]
    candidates: dict[str, str]  # id -> text
    positives: list[str]  # texts of all known ones, the pair's own first
    given: list[str]  # negatives that came with the pair

    def texts(self) -> set[str]:
        """Each text once: a positive is often a candidate too."""
        return {*self.candidates.values(), *self.positives, *self.given}


class RescoringWorker:
    """Actor that scores one part of the queries."""

    def __init__(self, scorer: PairScorerSource, mined: Mined, top: int) -> None:
        self._scorer = scorer.open()
        self._name = scorer.name
        self._mined = mined
        self._top = top
        self._texts = mined.open_texts()

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Scores of positives and given negatives, then candidates, whose file marks the part done."""
        asked = self._asked(rows.to_pylist())
        scores = self._scores(asked)
        given = [self._score_row(*one) for one in zip(asked, scores, strict=True)]
        best = [self._candidate_row(*one) for one in zip(asked, scores, strict=True)]
        return {
            SCORES_FOLDER: pa.Table.from_pylist(given, schema=SCORES_SCHEMA),
            CANDIDATES_FOLDER: table_from_rows("candidates", best),
        }

    def _asked(self, queries: list[dict[str, Any]]) -> list[_Asked]:
        teachers = self._mined.found(queries[0]["part"])
        # Where the negatives come with the pair no rule reads candidates, so none is scored.
        best = [
            [] if negatives_given(row) else best_ranked([one[number].ids for one in teachers], self._top)
            for number, row in enumerate(queries)
        ]
        texts = self._texts_by_id([*best, *(row["known_positives"] for row in queries)])
        lost = next((name for names in best for name in names if name not in texts), None)
        if lost is not None:
            raise DataError(
                f"rescoring: candidate {lost!r} is no document of the corpus; mine again after changing the corpus"
            )
        return [
            _Asked(
                row,
                {name: texts[name] for name in names},
                [positive, *(texts[name] for name in row["known_positives"] if name in texts)],
                [text for text in row["negatives"] or [] if text.strip()],
            )
            for row, names, positive in zip(queries, best, positive_texts(self._texts, queries), strict=True)
        ]

    def _texts_by_id(self, lists: Iterable[Iterable[str]]) -> dict[str, str]:
        names = list({name for names in lists for name in names})
        positions = self._texts.find(names).tolist()
        texts = self._texts.texts(at for at in positions if at >= 0)
        return {name: texts[at] for name, at in zip(names, positions, strict=True) if at >= 0}

    def _scores(self, asked: list[_Asked]) -> list[dict[str, float]]:
        """Score of each text with its query; a pair that stands in several rows is scored once."""
        pairs = {
            (one.row["text"], text, one.row["task_type"], one.row["instruction"]): 0.0
            for one in asked
            for text in sorted(one.texts())  # a set's order differs from process to process, batches must not
        }
        found = self._scorer.score(*zip(*pairs, strict=True))
        pairs = dict(zip(pairs, found.tolist(), strict=True))
        return [
            {
                text: pairs[one.row["text"], text, one.row["task_type"], one.row["instruction"]]
                for text in one.texts()
            }
            for one in asked
        ]

    def _score_row(self, asked: _Asked, scores: dict[str, float]) -> dict[str, Any]:
        return {
            "query_id": asked.row["id"],
            "teacher": self._name,
            "positive_score": scores[asked.positives[0]],
            "lowest_score": min(scores[text] for text in asked.positives),
            "given_scores": [scores[text] for text in asked.given],
        }

    def _candidate_row(self, asked: _Asked, scores: dict[str, float]) -> dict[str, Any]:
        order = sorted((-scores[text], name) for name, text in asked.candidates.items())
        return {
            "query_id": asked.row["id"],
            "document_ids": [name for _, name in order],
            "scores": [-score for score, _ in order],
            "teacher": self._name,
            "contract_hash": self._scorer.contract_hash,
        }
