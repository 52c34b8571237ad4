"""From sources to token groups, and the order of their ids under any number of workers."""

import json
import os
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.config.training import TrainingSource
from embedloom.core.storage import Place
from embedloom.encoder.model import Encoder
from embedloom.errors import DataError
from embedloom.training import data as prepare
from embedloom.training import data as store
from embedloom.training.data import (
    INDEX_FILE,
    ExampleStore,
    RowRules,
    TextTokens,
    prepare_sources,
)
from embedloom.training.order import BatchReader, ExampleOrder, Share, plan_batch, shares_of
from embedloom.training.sources import read_source
from fakes_training import prepare_source, training_config


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def line(number, negatives=2, **changes):
    words = "word " * (1 + number % 5)
    return {
        "id": f"r{number}", "query": f"{words}{number}", "pos": [f"yes {number}"],
        "neg": [f"no {number} {k}" for k in range(negatives)], **changes,
    }  # fmt: skip


def source_of(path, name="s", **settings):
    return TrainingSource(name=name, format="flagembedding", path=path, **settings)


def rules(negatives=3, repeat=True, skip_bad=False):
    return RowRules(negatives, repeat, skip_bad)


@pytest.fixture
def small_parts(monkeypatch):
    for module in (prepare, store):
        monkeypatch.setattr(module, "PART_ROWS", 8)


def test_prepared_rows_are_what_the_encoder_would_tokenize(tiny_model, tmp_path, small_parts):
    path = write_lines(tmp_path / "a.jsonl", [line(n, negatives=1 + n % 3) for n in range(20)])
    tokens, place = TextTokens(tiny_model), Place(str(tmp_path / "data"))
    index = prepare_source(source_of(path), tokens, rules(), place.child("s"))
    assert index["parts"] == [8, 8, 4]
    # Rows with 1, 2 or 3 negatives, 3 wanted: 7 x 2 + 7 x 1 + 6 x 0 repeats.
    assert index["repeated_negatives"] == 21
    examples = ExampleStore(place, {"s": "s"}, 3)
    encoder = Encoder.load(tiny_model, dtype="float32")
    for row in (0, 7, 8, 19):
        expected = line(row, negatives=1 + row % 3)
        (group,) = examples.groups([row])
        assert group.id == f"s/r{row}"
        assert group.query == encoder.tokenize([expected["query"]], "query")[0]
        texts = [expected["pos"][0], *(expected["neg"][k % len(expected["neg"])] for k in range(3))]
        assert group.documents == encoder.tokenize(texts, "document")
        assert examples.lengths([row]) == [group.lengths]


@pytest.mark.parametrize(
    ("task_type", "on_documents"), [("retrieval", False), ("sts", True), ("classification", False)]
)
def test_only_texts_that_stand_opposite_each_other_both_carry_the_instruction(
    tiny_model, tmp_path, task_type, on_documents
):
    path = write_lines(tmp_path / "a.jsonl", [line(0)])
    source = source_of(path, task_type=task_type, instruction="Do it")
    place = Place(str(tmp_path / "data"))
    prepare_source(source, TextTokens(tiny_model), rules(), place.child("s"))
    (group,) = ExampleStore(place, {"s": "s"}, 1).groups([0])
    encoder = Encoder.load(tiny_model, dtype="float32")
    instructed = encoder.tokenize(["yes 0"], "query", task_type, "Do it")[0]
    assert (group.documents[0] == instructed) is on_documents
    assert group.query == encoder.tokenize(["word 0"], "query", task_type, "Do it")[0]


def test_a_sources_own_number_of_negatives_repeats_fewer(tiny_model, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [line(0, negatives=4)])
    place = Place(str(tmp_path / "data"))
    prepare_source(source_of(path, negatives=1), TextTokens(tiny_model), rules(), place.child("s"))
    (group,) = ExampleStore(place, {"s": "s"}, 3).groups([0])
    assert group.documents[1] == group.documents[2] == group.documents[3]


BAD = {
    "no_query": line(3, query=" "),
    "no_positive": line(3, pos=[]),
    "no_negatives": line(3, neg=[]),
    "not_text": line(3, neg=[5]),
    "too_few_negatives": line(3, negatives=2),
}


@pytest.mark.parametrize("reason", sorted(BAD))
def test_a_bad_row_is_refused_by_source_and_id_or_counted(tiny_model, tmp_path, reason):
    rows = [line(0, negatives=3), BAD[reason], line(4, negatives=3)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    tokens, repeat = TextTokens(tiny_model), reason != "too_few_negatives"
    name = "a.jsonl:2" if reason == "not_text" else "r3"
    with pytest.raises(DataError, match=rf"source 's': row '(r3|a\.jsonl:2)': .*\({reason}\)") as caught:
        prepare_source(
            source_of(path), tokens, rules(repeat=repeat), Place(str(tmp_path / "data")).child("s")
        )
    assert "bad_rows: skip" in str(caught.value) and (name in str(caught.value) or reason == "not_text")
    skipping = rules(repeat=repeat, skip_bad=True)
    index = prepare_source(source_of(path), tokens, skipping, Place(str(tmp_path / "b")).child("s"))
    assert index["rejects"] == {reason: 1} and index["parts"] == [2]


def test_a_cap_above_the_usable_rows_is_refused(tiny_model, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [line(0), line(1)])
    config, data = training_config(), Place(str(tmp_path / "data"))
    for _ in range(2):  # the second time its rows are there already
        with pytest.raises(DataError, match=r"source 's': cap is 3, but it has 2 usable rows"):
            prepare_sources("t", config, 1, [source_of(path, cap=3)], None, tiny_model, data)


def in_one_go(source, tokens, limits, out):
    """Parts and counts of one process that goes through the source once; PART_ROWS rows are tokenized at a time."""
    tokenizing = prepare._Tokenizing(source, limits.negatives, tokens, limits, None)
    rows = read_source(source, None, out.local)
    kept = list(tokenizing.rows(prepare._usable(source, limits.negatives, rows, limits)))
    for number, start in enumerate(range(0, len(kept), prepare.PART_ROWS)):
        for kind, schema in (("part", prepare.PART_SCHEMA), ("keys", prepare.KEY_SCHEMA)):
            columns = {
                name: [getattr(row, name) for row in kept[start : start + prepare.PART_ROWS]]
                for name in schema.names
            }
            out.write_bytes(
                f"{kind}-{number:06d}.arrow", prepare._ipc_bytes(pa.table(columns, schema=schema))
            )
    return kept, tokenizing.cuts


def awkward_rows():
    """Rows of which every range loses some, in several ways, and one range all."""
    rows = [line(n, negatives=1 + n % 3) for n in range(60)]
    for number in (0, 5, 8, 9, 10, 11, 12, 13, 14, 15, 33):
        rows[number]["query"] = " "
    for number in (3, 21, 40):
        rows[number]["neg"] = rows[number]["pos"]
    rows[22]["neg"].append("YES 22")
    rows[23]["prompt"], rows[59]["prompt"] = "Find it", "Seek it"
    rows[24]["prompt"] = "a long one " * 40
    rows[25]["pos"] = ["a long text " * 20]
    return rows


def test_ranges_of_rows_become_the_bytes_and_counts_of_one_pass(tiny_model, tmp_path, small_parts):
    path = write_lines(tmp_path / "a.jsonl", awkward_rows())
    tokens, whole, place = (
        TextTokens(tiny_model),
        Place(str(tmp_path / "whole")),
        Place(str(tmp_path / "data")),
    )
    limits = rules(skip_bad=True)
    kept, cuts = in_one_go(source_of(path), tokens, limits, whole)
    index = prepare_source(source_of(path), tokens, rules(skip_bad=True), place.child("s"))
    # 11 empty queries, 3 rows of nothing but their positive, 1 long instruction; one range of 8 is lost whole.
    assert index["rejects"] == {"no_query": 11, "negative_is_positive": 3, "instruction_too_long": 1}
    assert index["parts"] == [8, 8, 8, 8, 8, 5] and len(kept) == 45
    assert index["cleaned"] == {"negative_is_positive": 1} == dict(limits.cleaned)
    assert index["tokens"] == sum(sum(row.lengths) for row in kept)
    assert index["cut"] == asdict(cuts) and index["cut"]["cut"] > 0
    assert index["swallowed_by"] == limits.swallowed_by != ""
    instructions = {one["instruction"]: one["rows"] for one in index["prompts"]["kept"]}
    assert instructions["Find it"] == instructions["Seek it"] == 1 and sum(instructions.values()) == 45
    names = [name for name in place.names("s") if name.endswith(".arrow")]
    assert [f"s/{name}" for name in whole.names()] == names
    for name in names:
        assert place.read_bytes(name) == whole.read_bytes(name.removeprefix("s/")), name
    assert place.names("s") == [f"s/{INDEX_FILE}", *names]  # what stood between is gone


def test_a_bad_row_is_told_before_what_comes_after_it_is_read(tiny_model, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [line(0), line(1, pos=[])])
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write("no JSON\n")
    with pytest.raises(DataError, match=r"row 'r1': it has no positive"):
        prepare_source(
            source_of(path), TextTokens(tiny_model), rules(), Place(str(tmp_path / "data")).child("s")
        )


def test_a_killed_preparation_does_only_what_was_not_done(tiny_model, tmp_path, small_parts, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", awkward_rows())
    tokens, place, whole = (
        TextTokens(tiny_model),
        Place(str(tmp_path / "data")),
        Place(str(tmp_path / "whole")),
    )
    source = source_of(path)
    index = prepare_source(source, tokens, rules(skip_bad=True), whole.child("s"))
    done, written = [], Place.write_bytes

    def killed_at(name_end):
        def write(self, name, content):
            if name.endswith(name_end):
                raise KeyboardInterrupt
            done.append(name)
            written(self, name, content)

        return write

    # Killed while rows are read, in the counts of a range, between the two files of a part, and before the index.
    for name_end in ("rows-000003.parquet", "_ranges/000004.json", "keys-000002.arrow", f"s/{INDEX_FILE}"):
        name_end = name_end.removeprefix("s/") if name_end.endswith(INDEX_FILE) else name_end
        with monkeypatch.context() as context:
            context.setattr(Place, "write_bytes", killed_at(name_end))
            if name_end == INDEX_FILE:  # of the source, not that of its rows, which are there
                assert any(name == INDEX_FILE for name in done)
            with pytest.raises(KeyboardInterrupt):
                prepare_source(source, tokens, rules(skip_bad=True), place.child("s"))
        assert not place.exists(f"s/{INDEX_FILE}")
    assert prepare_source(source, tokens, rules(skip_bad=True), place.child("s")) == index
    assert place.names("s") == whole.names("s")
    for name in whole.names("s"):
        assert place.read_bytes(name) == whole.read_bytes(name)
    # Nothing that was finished was written again.
    finished = [name for name in done if name.startswith(("rows-", "part-", "_ranges/0"))]
    assert len(finished) == len(set(finished)) and len(finished) > 14


@pytest.fixture(scope="module")
def mixed(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    place = Place(str(root / "data"))
    sources = (
        source_of(write_lines(root / "a.jsonl", [line(n) for n in range(23)]), "a", cap=20),
        source_of(write_lines(root / "b.jsonl", [line(n) for n in range(9)]), "b"),
    )
    for source in sources:
        prepare_source(source, TextTokens(tiny_model), rules(), place.child(source.name))
    return ExampleStore(place, {"a": "a", "b": "b"}, 3), sources


BATCH = 5


def ids_seen(examples, sources, first_step, last_step, world_size):
    """Ids in the order of the global batches, collected from what each worker of a fresh group would train on."""
    order = ExampleOrder(shares_of(sources, examples), seed=11)
    seen = []
    for step in range(first_step, last_step):
        rows = order.window(step * BATCH, (step + 1) * BATCH).tolist()
        plan = plan_batch(examples.lengths(rows), world_size, 60, 32)
        by_position = {}
        for own in plan.ranks:
            for part in own:
                for position in part:
                    assert position not in by_position
                    by_position[position] = examples.groups([rows[position]])[0].id
        seen += [by_position[position] for position in range(BATCH)]
    return seen


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 16), st.integers(1, 4), st.integers(1, 4))
def test_after_any_cut_and_any_change_of_workers_the_id_order_is_the_same(mixed, cut, before, after):
    examples, sources = mixed
    undisturbed = ids_seen(examples, sources, 0, 16, 1)
    resumed = ids_seen(examples, sources, 0, cut, before) + ids_seen(examples, sources, cut, 16, after)
    assert resumed == undisturbed


def test_an_epoch_holds_every_row_of_the_mix_once(mixed):
    examples, sources = mixed
    # 20 of source a and all 9 of b make an epoch of 29; 29 batches of 5 are 5 epochs.
    counts = Counter(ids_seen(examples, sources, 0, 29, 2))
    assert set(counts.values()) == {5}
    assert Counter(name[0] for name in counts) == {"a": 20, "b": 9}


def test_every_rank_has_as_many_micro_batches_within_the_budget_or_a_single_group():
    lengths = np.random.default_rng(0).integers(5, 60, size=(64, 4)).tolist()
    plan = plan_batch(lengths, 4, 500, 64)
    assert sum(plan.counts) == 64
    assert len({len(own) for own in plan.ranks}) == 1
    loads = [sum(sum(lengths[p]) for p in part) for own in plan.ranks for part in own]
    # Dealt out evenly, a micro-batch may pass the budget by less than its longest group.
    assert max(loads) < 500 + max(map(sum, lengths))
    assert plan.imbalance < 0.02


def many_parts(model, root, parts):
    """A source of so many parts, all with the same row."""
    place = Place(str(root / "data"))
    path = write_lines(root / "a.jsonl", [line(0)])
    index = prepare_source(source_of(path), TextTokens(model), rules(), place.child("s"))
    folder = place.local / "s"
    for kind in ("part", "keys"):
        for number in range(1, parts):
            os.link(folder / f"{kind}-000000.arrow", folder / f"{kind}-{number:06d}.arrow")
    place.write_json(f"s/{INDEX_FILE}", {**index, "parts": [1] * parts})
    return place


def test_no_part_is_opened_twice_however_many_there_are(tiny_model, tmp_path, monkeypatch):
    """3,000 parts; the limit of 2,048 open ones had every step open most of its files anew."""
    monkeypatch.setattr(store, "PART_ROWS", 1)
    place = many_parts(tiny_model, tmp_path, 3000)
    opened = Counter()
    mapped = store.pa.memory_map
    monkeypatch.setattr(store.pa, "memory_map", lambda path: opened.update([path]) or mapped(path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    examples = ExampleStore(place, {"s": "s"}, 3)
    order = ExampleOrder([Share("s", 0, 3000)], seed=1)
    for step in range(30):
        rows = order.window(step * 200, (step + 1) * 200).tolist()
        assert len(examples.lengths(rows)) == len(examples.groups(rows)) == 200
    assert len(opened) == 6000 and set(opened.values()) == {1}
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 100  # a mapping needs none


def reader_of(examples, sources, steps, rank=0, world_size=2):
    order = ExampleOrder(shares_of(sources, examples), seed=11)
    return BatchReader(order, examples, BATCH, steps, rank, world_size, 60, 32)


def test_what_is_read_ahead_is_what_each_step_would_have_read(mixed):
    """Two ranks; from the start, and from a step in the middle as after a restart."""
    examples, sources = mixed
    for first in (0, 4):
        readers = [reader_of(examples, sources, 9, rank) for rank in range(2)]
        for step in range(first, 9):
            order = ExampleOrder(shares_of(sources, examples), seed=11)
            rows = order.window(step * BATCH, (step + 1) * BATCH).tolist()
            seen = [reader.step(step) for reader in readers]
            assert [one.rows for one in seen] == [rows, rows]
            assert seen[0].lengths == examples.lengths(rows)
            own = Counter(group.id for one in seen for part in one.own for group in part)
            assert own == Counter(examples.ids(rows))
            assert seen[1].first == examples.groups(rows[:1])
        for reader in readers:
            reader.close()


class Watched:
    """A store that tells from which thread and for which rows it is asked, and fails where it is told to."""

    def __init__(self, examples, failing=None):
        self.examples, self.failing = examples, failing
        self.asked, self.sizes, self.first_row = [], examples.sizes, examples.first_row
        self.read = threading.Semaphore(0)

    def lengths(self, rows):
        self.asked.append((tuple(rows), threading.current_thread()))
        if len(self.asked) == self.failing:
            raise OSError("the part is gone")
        return self.examples.lengths(rows)

    def groups(self, rows):
        found = self.examples.groups(rows)
        if len(rows) == 1 and rows[0] == self.asked[-1][0][0]:
            self.read.release()
        return found


def test_the_next_step_is_read_while_this_one_computes_and_nothing_beyond_the_last(mixed):
    examples, sources = mixed
    watched = Watched(examples)
    reader = reader_of(watched, sources, 3, world_size=1)
    for step in range(3):
        reader.step(step)
        # "Computing": this thread asks for nothing, and the next step's rows come all the same.
        wanted = min(step + 2, 3)
        while len({rows for rows, _ in watched.asked}) < wanted:
            assert watched.read.acquire(timeout=60)
    reader.close()
    assert len(watched.asked) == 3
    assert all(thread is not threading.main_thread() for _, thread in watched.asked)


def test_an_error_of_reading_ahead_is_raised_at_its_own_step(mixed):
    examples, sources = mixed
    reader = reader_of(Watched(examples, failing=2), sources, 5)
    assert len(reader.step(0).rows) == BATCH
    with pytest.raises(OSError, match="the part is gone"):
        reader.step(1)
    reader.close()
