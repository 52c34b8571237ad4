"""Positions and membership of ids, against dictionaries; digests that collide, made to."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from embedloom.core import ids as module
from embedloom.core.ids import IdIndex, IdSet


@pytest.fixture(params=[64, 3], ids=["64 bits", "3 bits"])
def bits(request, monkeypatch):
    """With three bits of digest nearly all ids collide: only the ids themselves tell them apart."""
    if request.param == 64:
        return
    real = module.hashes64
    monkeypatch.setattr(module, "hashes64", lambda texts: real(texts) % np.uint64(8))


def test_positions_are_a_dictionary_s(bits):
    names = [f"дом-{n * 7919 % 1000}" for n in range(1000)]
    index = IdIndex.of(pa.array(names, pa.large_string()))
    asked = [*names[::3], "absent", "", names[5], names[5]]
    expected = {name: place for place, name in enumerate(names)}
    assert index.find(asked).tolist() == [expected.get(name, -1) for name in asked]
    found = pc.index_in(pa.array(asked, pa.large_string()), value_set=pa.array(names, pa.large_string()))
    assert index.find(pa.array(asked, pa.string())).tolist() == pc.fill_null(found, -1).to_pylist()


def test_nothing_among_nothing(bits):
    index = IdIndex.of(pa.array([], pa.large_string()))
    assert index.find(["a"]).tolist() == [-1]
    assert IdIndex.of(pa.array(["a"], pa.large_string())).find([]).tolist() == []
    assert IdSet([]).contains(["a"]).tolist() == [False]


def test_members_are_a_set_s():
    parts = [[f"a{n}" for n in range(50)], [], [f"a{n}" for n in range(40, 90)]]
    found = IdSet(parts)
    asked = [f"a{n}" for n in range(0, 120, 7)]
    known = {name for part in parts for name in part}
    assert found.contains(asked).tolist() == [name in known for name in asked]
    assert len(found) == 100


def test_half_of_the_bits_alone_are_no_member(monkeypatch):
    real = module.hashes64
    # The first half of all digests is the same.
    monkeypatch.setattr(
        module,
        "hashes64",
        lambda texts: np.array(
            [h if t.startswith("\0") else 1 for t, h in _hashed(real, texts)], dtype=np.uint64
        ),
    )
    found = IdSet([["a", "b", "c"]])
    assert found.contains(["b", "d", "c"]).tolist() == [True, False, True]


def _hashed(real, texts):
    listed = list(texts)
    return zip(listed, real(listed), strict=True)
