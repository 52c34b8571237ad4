"""Refusals found by part, sorted or as a pass left them, against all files read; and how many are read."""

import random
from collections import defaultdict

import pytest

from embedloom.core.storage import Place
from embedloom.synthesis import refusals
from embedloom.synthesis.refusals import Round, refusal_table, refusals_of, sort_refusals
from fakes_serial import serial_tasks


def part(number: int) -> str:
    return f"part-{number:06d}.parquet"


def brute_force(place, one, parts):
    """Of several passes the first, within it the smallest; every file read, row by row."""
    found = {name: {} for name in parts}
    for folder in one.passes:
        here = defaultdict(list)
        for name in place.names(f"{one.folder}/{folder}", ".parquet"):
            for row in place.read_table(name).to_pylist():
                here[row["part"], row["id"]].append((row["reason"], row["detail"]))
        for (name, identity), verdicts in here.items():
            if name in found:
                found[name].setdefault(identity, min(verdicts))
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "run_tasks", serial_tasks)
    return Place(str(tmp_path))


def write_round(place, parts, buckets):
    """Rows of any part in each bucket of duplicates, and a file a part for the judge; some rows are refused by both."""
    draw = random.Random(parts)
    one = Round("round", ("duplicates", "judge"), parts_together=3)
    for bucket in range(buckets):
        rows = [
            {"part": part(draw.randrange(parts)), "id": f"r{draw.randrange(40)}", "reason": "duplicate", "detail": f"of {draw.randrange(9)}"}
            for _ in range(draw.randrange(30))
        ]  # fmt: skip
        place.write_table(f"round/duplicates/bucket-{bucket:04d}.parquet", refusal_table(rows))
    for number in range(parts):
        rows = [
            {"part": part(number), "id": f"r{draw.randrange(40)}", "reason": "judge", "detail": "graded 1"}
        ] * (number % 3)
        place.write_table(f"round/judge/{part(number)}", refusal_table(rows))
    return one


@pytest.mark.parametrize("together", [1, 4, 64])
def test_sorted_refusals_are_those_of_all_files(together, place, monkeypatch):
    monkeypatch.setattr(refusals, "_TOGETHER", together)
    one = write_round(place, 20, 9)
    groups = [[part(n) for n in own] for own in (range(3), range(18, 20), [7], range(20), [30])]
    expected = [brute_force(place, one, names) for names in groups]
    assert [refusals_of(place, one, names) for names in groups] == expected
    sort_refusals("test", place, one, "duplicates")
    assert [refusals_of(place, one, names) for names in groups] == expected  # one pass sorted, one not
    sort_refusals("test", place, one, "judge")
    assert [refusals_of(place, one, names) for names in groups] == expected
    assert sum(map(len, expected[3].values())) > 50


def test_a_pass_without_refusals_names_nobody(place):
    one = Round("round", ("duplicates",))
    sort_refusals("test", place, one, "duplicates")
    assert refusals_of(place, one, [part(0)]) == {part(0): {}}
    place.write_table("round/duplicates/bucket-0000.parquet", refusal_table([]))
    sort_refusals("test", place, one, "duplicates")
    assert place.read_json("round/duplicates-by-part.json") == {"files": []}
    assert refusals_of(place, one, [part(0)]) == {part(0): {}}


def reads(place, parts, monkeypatch):
    """Files that are opened so that every group of parts has its refusals."""
    one = write_round(place, parts, 8)
    for name in one.passes:
        sort_refusals("test", place, one, name)
    count = 0
    real = Place.read_table

    def counted(self, name, *arguments, **options):
        nonlocal count
        count += 1
        return real(self, name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "read_table", counted)
        for start in range(0, parts, one.parts_together):
            refusals_of(place, one, [part(n) for n in range(start, min(parts, start + one.parts_together))])
    return count


def test_files_read_grow_with_the_parts_and_not_with_their_square(tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "run_tasks", serial_tasks)
    monkeypatch.setattr(refusals, "_TOGETHER", 8)
    small, large = (reads(Place(str(tmp_path / str(n))), n, monkeypatch) for n in (30, 120))
    assert small < large <= 4.4 * small
