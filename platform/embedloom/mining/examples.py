"""Training examples out of mined candidates: the selection rules applied, every removal counted."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedloom.config.mining import SelectionConfig
from embedloom.core.prompting import LABEL_TASK_TYPES, is_instructed, opposite_task_type
from embedloom.core.schemas import TEACHER_SCORES_FOLDER, TEACHER_SCORES_SCHEMA, table_from_rows
from embedloom.core.text import folded
from embedloom.mining.audit import NEAR_DUPLICATE, audit_facts, near_duplicate
from embedloom.mining.candidates import Found, Mined, given_texts, negatives_given, positive_texts
from embedloom.mining.select import Selection, blend, query_seed, select_negatives
from embedloom.retrieval.search import Positions

EXAMPLES_FOLDER = "examples"
AUDIT_FOLDER = "audit"
REJECTS_FOLDER = "rejects"
SAMPLE_FOLDER = "sample"

AUDIT_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("dataset", pa.string()),
        ("task_type", pa.string()),
        ("teacher", pa.string()),
        ("positive_score", pa.float32()),  # lowest of the known positives
        ("candidates", pa.int32()),
        ("removed_as_positive", pa.int32()),
        ("removed_by_margin", pa.int32()),
        ("removed_by_rank", pa.int32()),
        ("removed_by_floor", pa.int32()),
        ("selected", pa.int32()),
        ("given", pa.bool_()),  # the negatives came with the pair
        ("naive", pa.int32()),
        ("naive_removed", pa.int32()),
        ("gaps", pa.list_(pa.float32())),  # positive_score - score of each selected negative
        ("near_duplicates", pa.int32()),
    ]
)
SAMPLE_SCHEMA = pa.schema(
    [
        ("draw", pa.uint64()),  # a sample of any size is the rows with the smallest
        ("query", pa.string()),
        ("query_instruction", pa.string()),
        ("task_type", pa.string()),
        ("positive", pa.string()),
        ("negative", pa.string()),
        ("kind", pa.string()),
        ("rank", pa.int32()),
    ]
)


FACTS_KEY = b"facts"  # of a part, in its footers, so that whoever sums all parts reads no rows
_EXAMPLE_FACTS = ("origins", "score_sum", "short")


def facts_of(examples: pa.Table, rejects: pa.Table, audit: pa.Table, negatives: int) -> dict[str, Any]:
    """What is counted of a part, JSON-like.

    Args:
        examples: its examples.
        rejects: its rejects.
        audit: its audit table.
        negatives: how many were asked for per example.
    """
    short = pc.sum(pc.less(pc.list_value_length(examples.column("negatives")), negatives)).as_py() or 0
    return {
        "origins": dict(Counter(examples.column("dataset").to_pylist())),
        "score_sum": float(sum(examples.column("positive_score").to_pylist())),
        "short": int(short),
        "rejects": dict(Counter(rejects.column("reason").to_pylist())),
        "audit": audit_facts(audit, negatives),
    }


class ExampleWorker:
    """Actor that turns one part of the queries into examples."""

    def __init__(self, rules: SelectionConfig, mined: Mined) -> None:
        self._rules = rules
        self._mined = mined
        self._texts = mined.open_texts()
        self._chunks = mined.open_chunks(self._texts)

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        """Build one part; the examples are named last, so their file marks it done."""
        queries = rows.to_pylist()
        found = self._mined.found(queries[0]["part"])
        positives = positive_texts(self._texts, queries)
        known = self._texts.find_lists([row["known_positives"] for row in queries])
        right = self._right_texts(queries, positives, known)
        places = [self._texts.find_lists([one.ids for one in teacher]) for teacher in found]
        chosen = [
            self._select(
                row,
                right[number],
                known[number],
                [(teacher[number], at[number]) for teacher, at in zip(found, places, strict=True)],
            )
            for number, row in enumerate(queries)
        ]
        wanted = {key for one in chosen for key in [*one.ids, *one.naive[:1]] if isinstance(key, int)}
        texts = self._texts.texts(wanted)
        examples, audit, rejects, sample, by_teacher = [], [], [], [], []
        for number, (row, positive, one) in enumerate(zip(queries, positives, chosen, strict=True)):
            mined = found[0][number]
            negatives = [texts[key] if isinstance(key, int) else str(key) for key in one.ids]
            if len(negatives) < self._rules.min_negatives:
                reason = _reject_reason(row, one)
                rejects.append({"id": row["id"], "reason": reason, "detail": f"{len(negatives)} survived"})
            else:
                examples.append(self._example(row, positive, mined, negatives, one.scores))
                if len(found) > 1:
                    own = [(teacher[number], at[number]) for teacher, at in zip(found, places, strict=True)]
                    by_teacher.append(self._teachers_scores(row, one, own))
            audit.append(_audit_row(row, mined, one, positive, negatives))
            if not negatives_given(row):
                naive = texts[one.naive[0]] if one.naive else None
                sample += _sample_rows(row, positive, negatives[:1], [naive] if naive else [])
        tables = {
            REJECTS_FOLDER: table_from_rows("rejects", rejects),
            AUDIT_FOLDER: pa.Table.from_pylist(audit, schema=AUDIT_SCHEMA),
            EXAMPLES_FOLDER: table_from_rows("examples", examples),
        }
        facts = facts_of(
            tables[EXAMPLES_FOLDER], tables[REJECTS_FOLDER], tables[AUDIT_FOLDER], self._rules.negatives
        )
        counted = {EXAMPLES_FOLDER: _EXAMPLE_FACTS, REJECTS_FOLDER: ("rejects",), AUDIT_FOLDER: ("audit",)}
        stamped = {
            folder: table.replace_schema_metadata(
                {FACTS_KEY: json.dumps({key: facts[key] for key in counted[folder]})}
            )
            for folder, table in tables.items()
        }
        several = {TEACHER_SCORES_FOLDER: pa.Table.from_pylist(by_teacher, schema=TEACHER_SCORES_SCHEMA)}
        return {
            **(several if len(found) > 1 else {}),
            REJECTS_FOLDER: stamped[REJECTS_FOLDER],
            AUDIT_FOLDER: stamped[AUDIT_FOLDER],
            SAMPLE_FOLDER: pa.Table.from_pylist(sample, schema=SAMPLE_SCHEMA),
            EXAMPLES_FOLDER: stamped[EXAMPLES_FOLDER],
        }

    def _right_texts(
        self, queries: list[dict[str, Any]], positives: list[str], known: list[Positions]
    ) -> list[set[str]]:
        """Texts that are no negatives of each query, case and blanks aside: its right answers, and itself.

        Those of its known positives in the corpus only where negatives came with it: the others are compared by place.
        """
        given = [
            at[at >= 0].tolist() if negatives_given(row) else []
            for row, at in zip(queries, known, strict=True)
        ]
        found = self._texts.texts({position for own in given for position in own})
        return [
            {folded(text) for text in (positive, *(row.get("rights") or ()), *(found[at] for at in own))}
            | ({folded(row["text"])} if row["task_type"] not in LABEL_TASK_TYPES else set())
            for row, positive, own in zip(queries, positives, given, strict=True)
        ]

    def _select(
        self, row: dict[str, Any], right: set[str], known: Positions, mined: list[tuple[Found, Positions]]
    ) -> Selection[Any]:
        """Negatives of one query: positions of documents, or the texts that came with the pair."""
        rules = self._rules
        if negatives_given(row):
            given = mined[0][0].given
            texts = given_texts(row)[-len(given) :] if given else []
            scored = dict(zip(texts, given, strict=True))
            negatives = [(text, score) for text, score in scored.items() if folded(text) not in right]
            kept = negatives[: rules.negatives]
            return Selection(
                [text for text, _ in kept],
                [score for _, score in kept],
                removed_as_positive=len(scored) - len(negatives),
            )
        places = known[known >= 0]
        if self._chunks is not None:
            places = np.array([*places, *self._chunks.pieces(places.tolist())], dtype=np.int64)
        excluded = {
            *(self._texts.position_of(text) for text in right),
            *self._texts.same_text(places).tolist(),
        }
        seed = query_seed(row["id"], "negatives")
        selections = [
            select_negatives(
                self._texts.same_text(places).tolist(),
                one.scores,
                excluded,
                one.lowest,
                rules,
                seed,
            )
            for one, places in mined
        ]
        return blend(selections, rules, row["id"])

    def _teachers_scores(
        self, row: dict[str, Any], one: Selection[Any], mined: list[tuple[Found, Positions]]
    ) -> dict[str, Any]:
        """What every teacher says of an example's documents; null where a negative is none of its candidates."""
        of_negatives = []
        for found, places in mined:
            keys = given_texts(row)[-len(found.given) :] if found.given else []
            scores = found.given
            if not negatives_given(row):
                keys, scores = self._texts.same_text(places).tolist(), found.scores
            # Best first: of documents with one text the first counts, as in the selection.
            known = dict(reversed(list(zip(keys, scores, strict=True))))
            of_negatives.append([known.get(key) for key in one.ids])
        return {
            "id": row["id"],
            "teachers": [found.teacher for found, _ in mined],
            "positive_scores": [found.positive for found, _ in mined],
            "negative_scores": of_negatives,
        }

    def _example(
        self, row: dict[str, Any], positive: str, mined: Found, negatives: list[str], scores: list[float]
    ) -> dict[str, Any]:
        instructed = is_instructed("document", opposite_task_type(row["task_type"]))
        return {
            "id": row["id"],
            "query": row["text"],
            "query_instruction": row["instruction"],
            "positive": positive,
            "positive_score": mined.positive,
            "negatives": negatives,
            "negative_scores": scores,
            "document_instruction": row["instruction"] if instructed else None,
            "task_type": row["task_type"],
            "dataset": row["dataset"],
        }


def _reject_reason(row: dict[str, Any], one: Selection[Any]) -> str:
    if one.ids:
        return "too_few_negatives"
    return "negative_is_positive" if negatives_given(row) and one.removed_as_positive else "no_negative_left"


def _audit_row(
    row: dict[str, Any], mined: Found, one: Selection[Any], positive: str, negatives: list[str]
) -> dict[str, Any]:
    return {
        "query_id": row["id"],
        "dataset": row["dataset"],
        "task_type": row["task_type"],
        "teacher": mined.teacher,
        "positive_score": mined.lowest,
        "candidates": one.candidates,
        "removed_as_positive": one.removed_as_positive,
        "removed_by_margin": one.removed_by_margin,
        "removed_by_rank": one.removed_by_rank,
        "removed_by_floor": one.removed_by_floor,
        "selected": len(one.ids),
        "given": negatives_given(row),
        "naive": len(one.naive),
        "naive_removed": one.naive_removed,
        "gaps": [mined.lowest - score for score in one.scores],
        "near_duplicates": sum(near_duplicate(positive, text) >= NEAR_DUPLICATE for text in negatives),
    }


def _sample_rows(
    row: dict[str, Any], positive: str, selected: list[str], naive: list[str]
) -> list[dict[str, Any]]:
    common = {
        "draw": query_seed(row["id"], "audit"),
        "query": row["text"],
        "query_instruction": row["instruction"],
        "task_type": row["task_type"],
        "positive": positive,
        "rank": 1,
    }
    return [
        {**common, "negative": text, "kind": kind}
        for kind, texts in (("selected", selected), ("naive", naive))
        for text in texts
    ]
