"""Headers and layouts are what safetensors itself reads and writes; broken files are named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.merging.tensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorFolder,
    TensorInfo,
    open_tensors,
    weight_files,
    write_index,
)

TENSORS = {
    "a.weight": torch.randn(3, 5), "b.bias": torch.randn(7).to(torch.bfloat16), "c.ids": torch.arange(6).reshape(2, 3),
    "d.flag": torch.tensor([True, False, True]), "e.half": torch.randn(3).half(), "f.scalar": torch.tensor(2.5),
    "g.empty": torch.zeros(0, 4),
}  # fmt: skip
INFOS = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def folder_of(path):
    return TensorFolder(Place(str(path)))


def test_headers_and_values_are_those_safetensors_wrote(tmp_path):
    save_file(TENSORS, tmp_path / WEIGHTS_FILE)
    folder = folder_of(tmp_path)
    assert {info.name: info for info in INFOS} == folder.infos
    for name, tensor in TENSORS.items():
        with open_tensors([folder], name) as (reader,):
            assert torch.equal(reader.raw(0, tensor.numel()), tensor.reshape(-1))
            assert torch.equal(reader.read(0, tensor.numel()), tensor.reshape(-1).float())


def test_written_layout_is_read_by_safetensors(tmp_path):
    (file,) = weight_files(INFOS, 10**9)
    content = file.header + b"".join(
        TENSORS[info.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for info in file.infos
    )
    (tmp_path / file.name).write_bytes(content)
    assert len(content) == file.nbytes
    loaded = load_file(tmp_path / WEIGHTS_FILE)
    assert set(loaded) == set(TENSORS)
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "theirs.safetensors").stat().st_size == file.nbytes


def test_files_hold_at_most_the_asked_bytes_and_the_index_names_them(tmp_path):
    files = weight_files(INFOS, 64)
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert all(sum(info.nbytes for info in file.infos) <= 64 for file in files)
    write_index(Place(str(tmp_path)), files)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in INFOS)
    assert set(index["weight_map"]) == set(TENSORS)


def test_missing_and_broken_weights_are_named(tmp_path):
    with pytest.raises(DataError, match="only safetensors weights"):
        folder_of(tmp_path)
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    with pytest.raises(
        DataError, match=r"two\.safetensors: missing, but model\.safetensors\.index\.json names it"
    ):
        folder_of(tmp_path)
    for content in (
        b"",
        b"not safetensors at all",
        (99).to_bytes(8, "little") + b"{}",
        b"\x02" + b"\0" * 7 + b"[]",
    ):
        (tmp_path / "two.safetensors").write_bytes(content)
        with pytest.raises(DataError, match=r"two\.safetensors: not readable as safetensors"):
            folder_of(tmp_path)
    save_file({"b": torch.ones(30)}, tmp_path / "two.safetensors")
    whole = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(whole[:-40])
    with pytest.raises(
        DataError, match=r"two\.safetensors: ends at byte \d+, inside tensor 'b'; the file was cut short"
    ):
        folder_of(tmp_path)
    (tmp_path / INDEX_FILE).write_text("[]")
    with pytest.raises(DataError, match="not an index"):
        folder_of(tmp_path)


def test_types_without_arithmetic_are_refused(tmp_path):
    save_file({"x": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(DataError, match="tensor 'x' is F8_E4M3; allowed: F64, F32"):
        folder_of(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    save_file({"x": torch.ones(1000)}, tmp_path / WEIGHTS_FILE)
    folder = folder_of(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes((tmp_path / WEIGHTS_FILE).read_bytes()[:-2000])
    with open_tensors([folder], "x") as (reader,), pytest.raises(DataError, match="ended inside tensor 'x'"):
        reader.raw(0, 1000)
