"""Counts, audit and sample of finished examples out of footers, against all rows read again."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.errors import StageError
from embedloom.mining.audit import audit_summary, summed_audit
from embedloom.mining.examples import AUDIT_SCHEMA, FACTS_KEY, SAMPLE_SCHEMA, facts_of
from embedloom.mining.stage import draw_sample, example_counts, part_facts

PARTS = [f"part-{n:06d}.parquet" for n in range(4)]
WANTED = 3


def example(number: int) -> dict[str, object]:
    return {
        "id": f"e{number}", "query": "q", "query_instruction": "i", "positive": "p", "positive_score": 0.1 * (number % 7),
        "negatives": ["n"] * (number % 5), "negative_scores": [0.1] * (number % 5), "task_type": "retrieval",
        "dataset": ["natural", "synthetic", "Wörter"][number % 3],
    }  # fmt: skip


def audited(number: int) -> dict[str, object]:
    row: dict[str, object] = {field.name: number % 4 for field in AUDIT_SCHEMA}
    return row | {
        "query_id": f"q{number}", "dataset": ["natural", "synthetic"][number % 2], "task_type": "sts", "teacher": "t",
        "positive_score": 0.5, "given": number % 5 == 0, "gaps": [0.013 * (number % 50)] * (number % 4),
    }  # fmt: skip


@pytest.fixture(params=[True, False], ids=["footers", "an earlier version's parts"])
def place(request, tmp_path):
    place = Place(str(tmp_path))
    for n, part in enumerate(PARTS):
        numbers = range(100 * n, 100 * n + 17 * n)  # the first is empty
        tables = {
            "examples": table_from_rows("examples", [example(number) for number in numbers]),
            "rejects": table_from_rows(
                "rejects", [{"id": str(m), "reason": f"r{m % 3}", "detail": ""} for m in numbers]
            ),
            "audit": pa.Table.from_pylist([audited(number) for number in numbers], schema=AUDIT_SCHEMA),
        }
        facts = facts_of(*tables.values(), WANTED)
        for folder, table in tables.items():
            own = {
                "examples": ("origins", "score_sum", "short"),
                "rejects": ("rejects",),
                "audit": ("audit",),
            }[folder]
            stamped = {FACTS_KEY: json.dumps({key: facts[key] for key in own})}
            place.write_table(
                f"{folder}/{part}", table.replace_schema_metadata(stamped if request.param else None)
            )
    return place


def rows_of(place, folder):
    return [row for part in PARTS for row in place.read_table(f"{folder}/{part}").to_pylist()]


def test_counts_are_those_of_the_rows(place, monkeypatch):
    expected, rejects, audit = rows_of(place, "examples"), rows_of(place, "rejects"), audit_of_all(place)
    stamped = FACTS_KEY in (place.parquet_footer(f"audit/{PARTS[1]}")[0].metadata or {})
    if stamped:  # no row is read
        monkeypatch.setattr(Place, "read_table", lambda *_: pytest.fail("rows were read"))
    facts = [part_facts(place, part, WANTED) for part in PARTS]
    assert example_counts(facts) == {
        "rows": len(expected),
        "rows_by_origin": dict(sorted(Counter(row["dataset"] for row in expected).items())),
        "rejects": dict(sorted(Counter(row["reason"] for row in rejects).items())),
        "short_negatives": sum(len(row["negatives"]) < WANTED for row in expected),
        "mean_positive_score": round(sum(row["positive_score"] for row in expected) / len(expected), 4),
    }
    assert summed_audit((one["audit"] for one in facts), WANTED) == audit


def audit_of_all(place):
    return audit_summary((place.read_table(f"audit/{part}") for part in PARTS), WANTED)


def test_nothing_counts_as_nothing():
    assert example_counts([]) == {
        "rows": 0, "rows_by_origin": {}, "rejects": {}, "short_negatives": 0, "mean_positive_score": 0.0,
    }  # fmt: skip


def sample_table(draws, part):
    texts = {name: ["x"] * len(draws) for name in SAMPLE_SCHEMA.names if name not in ("draw", "kind", "rank")}
    columns = {
        "draw": draws,
        **texts,
        "kind": ["selected", "naive"] * (len(draws) // 2),
        "rank": [part] * len(draws),
    }
    return pa.table({name: columns[name] for name in SAMPLE_SCHEMA.names}, schema=SAMPLE_SCHEMA)


@pytest.mark.parametrize("queries", [1, 7, 40, 1000])
def test_the_sample_is_the_smallest_draws_and_other_parts_are_not_read(queries, tmp_path, monkeypatch):
    place, random = Place(str(tmp_path)), np.random.default_rng(queries)
    draws = random.integers(0, 2**64, (4, 20), dtype=np.uint64)
    draws[2, :5] = draws[0, :5]  # the same query stands in two parts
    for number, part in enumerate(PARTS):
        place.write_table(f"sample/{part}", sample_table(np.repeat(draws[number], 2).tolist(), number))
    found = draw_sample(place, PARTS, queries)
    every = pa.concat_tables([place.read_table(f"sample/{part}") for part in PARTS])
    smallest = sorted(set(every.column("draw").to_pylist()))[:queries]
    expected = [row for row in every.to_pylist() if row["draw"] in smallest]
    key = lambda row: (row["draw"], row["kind"], row["rank"])  # noqa: E731
    assert sorted(found.to_pylist(), key=key) == sorted(expected, key=key)
    assert found.column("draw").to_pylist() == sorted(found.column("draw").to_pylist())


def test_no_part_has_no_sample(tmp_path):
    with pytest.raises(StageError, match="no query to judge"):
        draw_sample(Place(str(tmp_path)), [], 3)
