"""Reading tensors of a model folder one by one, and writing a folder's tensors without holding them."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embedloom.errors import DataError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 4 * 10**9

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, type and shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return self.elements * int(self.dtype.itemsize)


class TensorFolder:
    """The safetensors of one model folder, single or sharded."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            DataError: no safetensors, a shard of the index missing, or a file that is not safetensors.
        """
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.infos: dict[str, TensorInfo] = {}
        for file in _weight_files(folder):
            for info in _infos(file):
                self._files[info.name] = file
                self.infos[info.name] = info

    def load(self, name: str) -> Tensor:
        """One tensor; nothing else of its file is read."""
        with safe_open(self._files[name], framework="pt") as stream:
            tensor: Tensor = stream.get_tensor(name)
        return tensor


def write_tensors(
    folder: Path, infos: list[TensorInfo], load: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write tensors in the layout transformers loads, computing each when its turn comes.

    Memory holds one tensor at a time. Files are written beside and renamed, the index last.

    Args:
        folder: existing folder.
        infos: what will be written.
        load: gives the tensor of a name, of exactly the stated dtype and shape.
        shard_bytes: files are cut so that none exceeds this, unless one tensor does.

    Returns:
        Names of the weight files.
    """
    # Wide types first keeps every tensor aligned, as the format asks.
    ordered = sorted(infos, key=lambda info: (-info.dtype.itemsize, info.name))
    shards = _cut(ordered, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / WEIGHTS_FILE, shards[0], load)
        return [WEIGHTS_FILE]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, load)
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in ordered)},
        "weight_map": {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard},
    }
    _rename_into(folder / INDEX_FILE, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return names


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            raise DataError(
                f"{folder}: no {WEIGHTS_FILE} or {INDEX_FILE}; only safetensors weights can be merged"
            )
        return [folder / WEIGHTS_FILE]
    try:
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{index}: not an index of safetensors files: {error!r}") from error
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: missing, but {INDEX_FILE} names it")
    return files


def _infos(file: Path) -> list[TensorInfo]:
    try:
        with safe_open(file, framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
            found = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not readable as safetensors: {error}") from error
    for name, (code, _) in found.items():
        if code not in DTYPES:
            raise DataError(f"{file}: tensor {name!r} is {code}; allowed: {', '.join(DTYPES)}")
    return [TensorInfo(name, DTYPES[code], shape) for name, (code, shape) in found.items()]


def _cut(infos: list[TensorInfo], shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _write_file(path: Path, infos: list[TensorInfo], load: Callable[[str], Tensor]) -> None:
    """One safetensors file: header length, JSON header, then the tensors' bytes in the header's order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in infos:
        header[info.name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f"_tmp-{path.name}")
    with temporary.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for info in infos:
            tensor = load(info.name)
            if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
                raise DataError(
                    f"{path.name}: tensor {info.name!r} is {tensor.dtype} {list(tensor.shape)}, its header says {info.dtype} {list(info.shape)}"
                )
            stream.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _rename_into(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"_tmp-{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)
