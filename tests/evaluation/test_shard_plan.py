"""The plan of shards: every text once, whoever asks for it, and always the same plan."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedloom.core.storage import Place
from embedloom.encoder.tokenizer import CutTexts
from embedloom.evaluation.jobs import VectorStore, VectorTable, plan_shards, shard_id
from embedloom.evaluation.specs import TaskSpec


def keys_of(numbers):
    return np.asarray([(number * 7919 % 1009, number) for number in numbers], dtype=np.uint64).reshape(-1, 2)


def part(name, subset="default"):
    return TaskSpec(name), subset


@given(
    st.lists(st.lists(st.integers(0, 30), unique=True, max_size=20), min_size=1, max_size=5),
    st.integers(1, 7),
)
def test_every_text_is_embedded_once_and_every_part_finds_all_of_its_texts(lists, size):
    keys = {part(f"task{number}"): keys_of(numbers) for number, numbers in enumerate(lists)}
    plan = plan_shards(keys, size)
    content = {
        shard.id: [tuple(key) for key in keys[shard.part][shard.rows].tolist()] for shard in plan.shards
    }
    embedded = [key for found in content.values() for key in found]
    assert len(embedded) == len(set(embedded)) == len({number for numbers in lists for number in numbers})
    assert all(0 < len(found) <= size for found in content.values())
    for name, numbers in keys.items():
        needed = [key for shard in plan.needs[name] for key in content[shard]]
        wanted = {tuple(key) for key in numbers.tolist()}
        assert wanted <= set(needed)
        assert all(set(content[shard]) & wanted for shard in plan.needs[name])  # no shard for nothing


def test_texts_belong_to_the_first_part_that_has_them():
    first, second = part("first"), part("second", "deu")
    plan = plan_shards({first: keys_of([1, 2, 3]), second: keys_of([3, 4, 1])}, 2)
    assert [(shard.part, shard.rows.tolist()) for shard in plan.shards] == [
        (first, [0, 1]),
        (first, [2]),
        (second, [1]),
    ]
    assert plan.needs[second] == tuple(shard.id for shard in plan.shards)
    assert plan.needs[first] == tuple(shard.id for shard in plan.shards[:2])


def test_store_gives_back_what_was_written_and_knows_what_it_lacks(tmp_path):
    store = VectorStore(Place(str(tmp_path)))
    keys, vectors = keys_of(range(7)), np.random.default_rng(0).random((7, 4), dtype=np.float32)
    for rows in (slice(0, 4), slice(4, 7)):
        name = shard_id(keys[rows])
        assert not store.has(name)
        store.write(name, keys[rows], vectors[rows], tokens=10, padded=12)
        assert store.has(name) and store.summary(name) == ((10, 12), CutTexts())
    table = store.read([shard_id(keys[:4]), shard_id(keys[4:])])
    found, got = table.look_up(keys_of([6, 99, 0, 3]))
    assert found.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(got, vectors[[6, 0, 3]])
    nothing, none = store.read([]).look_up(keys)
    assert not nothing.any() and len(none) == 0


def test_keys_that_agree_in_their_first_half_only_are_not_taken_for_each_other():
    table = VectorTable(np.asarray([(5, 1)], dtype=np.uint64), np.ones((1, 2), dtype=np.float32))
    assert table.look_up(np.asarray([(5, 2)], dtype=np.uint64))[0].tolist() == [False]
