"""The streaming writer's files are what safetensors itself reads and writes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedloom.errors import DataError
from embedloom.merging.tensors import INDEX_FILE, WEIGHTS_FILE, TensorFolder, TensorInfo, write_tensors

TENSORS = {
    "a.weight": torch.randn(3, 5), "b.bias": torch.randn(7).to(torch.bfloat16), "c.ids": torch.arange(6).reshape(2, 3),
    "d.flag": torch.tensor([True, False, True]), "e.half": torch.randn(3).half(), "f.scalar": torch.tensor(2.5),
    "g.empty": torch.zeros(0, 4),
}  # fmt: skip
INFOS = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def test_written_file_is_read_by_safetensors(tmp_path):
    assert write_tensors(tmp_path, INFOS, TENSORS.__getitem__) == [WEIGHTS_FILE]
    loaded = load_file(tmp_path / WEIGHTS_FILE)
    assert set(loaded) == set(TENSORS)
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "theirs.safetensors").stat().st_size == (tmp_path / WEIGHTS_FILE).stat().st_size


def test_shards_hold_at_most_the_asked_bytes_and_read_back(tmp_path):
    names = write_tensors(tmp_path, INFOS, TENSORS.__getitem__, shard_bytes=64)
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 2
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in INFOS)
    folder = TensorFolder(tmp_path)
    assert {info.name: info for info in INFOS} == folder.infos
    assert all(same(folder.load(name), TENSORS[name]) for name in TENSORS)
    for name in names:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / name).values()) <= 64


def test_missing_and_broken_weights_are_named(tmp_path):
    with pytest.raises(DataError, match="only safetensors weights"):
        TensorFolder(tmp_path)
    names = write_tensors(tmp_path, INFOS, TENSORS.__getitem__, shard_bytes=64)
    (tmp_path / names[1]).unlink()
    with pytest.raises(DataError, match=f"{names[1]}: missing"):
        TensorFolder(tmp_path)
    (tmp_path / names[1]).write_bytes(b"not safetensors at all")
    with pytest.raises(DataError, match="not readable as safetensors"):
        TensorFolder(tmp_path)
    (tmp_path / INDEX_FILE).write_text("[]")
    with pytest.raises(DataError, match="not an index"):
        TensorFolder(tmp_path)


def test_a_tensor_other_than_announced_is_refused(tmp_path):
    with pytest.raises(DataError, match="'x' is"):
        write_tensors(tmp_path, [TensorInfo("x", torch.float32, (2,))], lambda _: torch.ones(3))
    assert not (tmp_path / WEIGHTS_FILE).exists()
