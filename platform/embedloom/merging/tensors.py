"""Where the tensors of a model folder lie: the headers of its safetensors, single or sharded, local or remote.

Only headers are read here, so a folder of any size is known at once and can be handed to another process.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from embedloom.errors import DataError
from embedloom.storage import Place

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


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
    """The safetensors of one model folder: what is in them, and where."""

    def __init__(self, place: Place) -> None:
        """Read the headers.

        Raises:
            DataError: no safetensors, a shard of the index missing or cut short, or a file that is not safetensors.
        """
        self.place = place
        self.infos: dict[str, TensorInfo] = {}
        self._where: dict[str, tuple[str, int]] = {}
        for file in _weight_files(place):
            for info, start in _header(place, file):
                self.infos[info.name] = info
                self._where[info.name] = (file, start)

    def renamed(self, names: Mapping[str, str]) -> "TensorFolder":
        """The same folder with only the tensors that have a name here: new name -> own name."""
        other = copy.copy(self)
        other.infos = {
            name: TensorInfo(name, self.infos[own].dtype, self.infos[own].shape)
            for name, own in names.items()
        }
        other._where = {name: self._where[own] for name, own in names.items()}
        return other

    def where(self, name: str) -> tuple[str, int]:
        """File of a tensor and the offset of its first byte."""
        return self._where[name]


def _weight_files(place: Place) -> list[str]:
    if not place.exists(INDEX_FILE):
        if not place.exists(WEIGHTS_FILE):
            raise DataError(
                f"{place.uri}: no {WEIGHTS_FILE} or {INDEX_FILE}; only safetensors weights can be merged"
            )
        return [WEIGHTS_FILE]
    try:
        files = sorted(set(json.loads(place.read_bytes(INDEX_FILE))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{place.uri}/{INDEX_FILE}: not an index of safetensors files: {error!r}") from error
    for file in files:
        if not place.exists(file):
            raise DataError(f"{place.uri}/{file}: missing, but {INDEX_FILE} names it")
    return files


def _header(place: Place, file: str) -> list[tuple[TensorInfo, int]]:
    """Tensors of one file with the offsets of their first bytes."""
    where = f"{place.uri}/{file}"
    size = place.state(file)[0]
    try:
        length = int.from_bytes(place.read_range(file, 0, 8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(place.read_range(file, 8, 8 + length))
        header.pop("__metadata__", None)
        found = [_entry(where, name, entry) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not readable as safetensors: {error}") from error
    for info, start, end in found:
        if end - start != info.nbytes:
            raise DataError(
                f"{where}: tensor {info.name!r} has {end - start} bytes, its shape and type {info.nbytes}"
            )
        if 8 + length + end > size:
            raise DataError(
                f"{where}: ends at byte {size}, inside tensor {info.name!r}; the file was cut short"
            )
    return [(info, 8 + length + start) for info, start, _ in found]


def _entry(where: str, name: str, entry: dict[str, Any]) -> tuple[TensorInfo, int, int]:
    code = entry["dtype"]
    if code not in DTYPES:
        raise DataError(f"{where}: tensor {name!r} is {code}; allowed: {', '.join(DTYPES)}")
    start, end = entry["data_offsets"]
    return TensorInfo(name, DTYPES[code], tuple(int(n) for n in entry["shape"])), int(start), int(end)
