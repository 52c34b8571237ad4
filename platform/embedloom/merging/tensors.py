"""The tensors of model folders: where they lie, under which common name, read in ranges and handed out in blocks."""

import copy
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from embedloom.core.storage import Place
from embedloom.errors import DataError

# Where the tensors of a model folder lie: the headers of its safetensors, single or sharded, local or remote.
#
# Only headers are read here, so a folder of any size is known at once and can be handed to another process.


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


# Tensors of one backbone under one name: prefixes of wrapper classes taken off, heads that not all models have left out.
#
# A causal language model is saved as ``model.layers.0...`` beside its ``lm_head``, the same backbone alone as
# ``layers.0...``; BERT for masked tokens as ``bert.encoder...`` beside ``cls``. Neither changes a vector.


# Modules of transformers behind or beside a backbone, and buffers that older versions stored.
_HEADS = {
    "lm_head", "embed_out", "score", "classifier", "classification_head", "qa_outputs", "cls", "predictions", "pooler",
    "vocab_transform", "vocab_layer_norm", "vocab_projector", "generator_predictions", "generator_lm_head",
    "discriminator_predictions", "mlm_head", "head", "value_head", "v_head",
}  # fmt: skip
_BUFFERS = ("rotary_emb.inv_freq", "position_ids", "token_type_ids", "attn.bias", "attn.masked_bias")
_DEEPEST_PREFIX = 3  # "model.language_model."


def align(models: Mapping[str, TensorFolder]) -> tuple[dict[str, TensorFolder], dict[str, list[str]]]:
    """All folders under the first one's names.

    Where no prefix brings a folder's names to the first's, it is left as it is: the check of the tensors says what is
    missing.

    Args:
        models: by name; the base too, where the method reads it.

    Returns:
        The folders, and the tensors that were left out because not all have them, each with those that do.
    """
    (first, reference), *others = models.items()
    backbone = [name for name in reference.infos if not _is_beside(name)]
    names = {first: {name: name for name in reference.infos}}
    names |= {name: _names_of(folder, backbone) for name, folder in others}
    beside = {new for own in names.values() for new in own if _is_beside(new)}
    shared = {new for new in beside if all(new in own for own in names.values())}
    kept = {
        name: {new: own for new, own in found.items() if new not in beside or new in shared}
        for name, found in names.items()
    }
    left_out = {new: [name for name, own in names.items() if new in own] for new in sorted(beside - shared)}
    return {name: models[name].renamed(found) for name, found in kept.items()}, left_out


def _names_of(folder: TensorFolder, backbone: list[str]) -> dict[str, str]:
    """New name -> own name of a folder's tensors, so that those of the backbone are called as they are there."""
    own = set(folder.infos)
    for taken, given in [("", ""), *_prefixes(own, backbone)]:
        mapped = {name: given + name.removeprefix(taken) for name in backbone if name.startswith(taken)}
        if len(mapped) == len(backbone) and own.issuperset(mapped.values()):
            rest = own - set(mapped.values())
            return mapped | {taken + name.removeprefix(given): name for name in rest}
    return {name: name for name in own}


def _prefixes(own: set[str], backbone: list[str]) -> list[tuple[str, str]]:
    """(taken off the first model's names, put before them) that could fit, shortest first."""
    given = {prefix for name in own for prefix in _starts(name)}
    taken = set.intersection(*(set(_starts(name)) for name in backbone)) if backbone else set()
    pairs = [("", prefix) for prefix in given] + [(prefix, "") for prefix in taken]
    pairs += [(one, other) for one in taken for other in given]
    return sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))


def _starts(name: str) -> list[str]:
    parts = name.split(".")[:-1][:_DEEPEST_PREFIX]
    return [".".join(parts[:count]) + "." for count in range(1, len(parts) + 1)]


def _is_beside(name: str) -> bool:
    """Whether a tensor is of a head, or a buffer; both may stand behind a wrapper's prefix (``bert.pooler``)."""
    parts = name.split(".")
    return parts[0] in _HEADS or (len(parts) > 1 and parts[1] in _HEADS) or name.endswith(_BUFFERS)


# The files of a merged model: which tensor goes where, known before any is computed.


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file to write."""

    name: str
    infos: tuple[TensorInfo, ...]  # in the order of their bytes

    @property
    def header(self) -> bytes:
        """Length and JSON header, as the format asks, padded so that the tensors are aligned."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in self.infos:
            entries[info.name] = {
                "dtype": CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + sum(info.nbytes for info in self.infos)


def weight_files(infos: list[TensorInfo], file_bytes: int) -> list[WeightFile]:
    """Cut tensors into files in the layout transformers loads.

    Args:
        infos: what will be written.
        file_bytes: no file's tensors exceed this, unless one tensor does. It decides the layout alone, so the same
            merge gives the same files on any number of workers.
    """
    # Wide types first keeps every tensor aligned, as the format asks.
    ordered = sorted(infos, key=lambda info: (-info.dtype.itemsize, info.name))
    cut: list[list[TensorInfo]] = [[]]
    size = 0
    for info in ordered:
        if cut[-1] and size + info.nbytes > file_bytes:
            cut.append([])
            size = 0
        cut[-1].append(info)
        size += info.nbytes
    if len(cut) == 1:
        return [WeightFile(WEIGHTS_FILE, tuple(cut[0]))]
    return [
        WeightFile(f"model-{number:05d}-of-{len(cut):05d}.safetensors", tuple(part))
        for number, part in enumerate(cut, start=1)
    ]


def write_index(place: Place, files: list[WeightFile]) -> None:
    """Write the index of several files; one file alone has none."""
    if len(files) == 1:
        return
    total = sum(info.nbytes for file in files for info in file.infos)
    mapping = {info.name: file.name for file in files for info in file.infos}
    place.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": mapping})


# Reading ranges of one stored tensor, so that no tensor has to be in memory as a whole.
#
# Local files are read where they lie, by position and not by mapping: mapped pages would count as memory of this
# process and stay until somebody else needs them. A tensor of an object store is fetched once, in large pieces, into
# an unnamed file of the scratch disk and read there.


_FETCH_BYTES = 32 * 2**20


class Scratch:
    """Buffers that are used again block after block, each thread's its own.

    Fresh ones would be given back to the system and zeroed by it for every block, which costs more than the sums.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def buffer(self, key: str, size: int) -> Tensor:
        """So many bytes, whatever was in them before."""
        buffers: dict[str, Tensor] = self._local.__dict__
        if key not in buffers or len(buffers[key]) < size:
            buffers[key] = torch.empty(size, dtype=torch.uint8)
        return buffers[key][:size]


class TensorReader:
    """One tensor as a flat row of elements; safe to use from several threads.

    What it returns is the reader's own and may be changed; it is good until the same thread reads from it again.
    """

    def __init__(
        self, folder: TensorFolder, name: str, descriptor: int, offset: int, scratch: Scratch, slot: int
    ) -> None:
        self.info = folder.infos[name]
        self._where = f"{folder.place.uri}/{folder.where(name)[0]}"
        self._descriptor = descriptor
        self._offset = offset
        self._scratch = scratch
        self._slot = slot

    def raw(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` in the stored type.

        Raises:
            DataError: the file ends before ``stop``.
        """
        size = self.info.dtype.itemsize
        values = self._scratch.buffer(f"raw{self._slot}", (stop - start) * size)
        buffer, done = memoryview(values.numpy()), 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], self._offset + start * size + done)
            if count == 0:
                raise DataError(
                    f"{self._where}: ended inside tensor {self.info.name!r}; it changed while being read"
                )
            done += count
        return values.view(self.info.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` as float32."""
        values = self.raw(start, stop)
        if values.dtype == torch.float32:
            return values
        return self._scratch.buffer(f"float{self._slot}", 4 * len(values)).view(torch.float32).copy_(values)


@contextmanager
def open_tensors(
    folders: list[TensorFolder], name: str, scratch: Scratch | None = None
) -> Iterator[list[TensorReader]]:
    """The same tensor of several folders, for the ``with`` block; ``scratch`` is kept from tensor to tensor."""
    scratch = scratch or Scratch()
    with ExitStack() as stack:
        readers = []
        for slot, folder in enumerate(folders):
            file, offset = folder.where(name)
            if folder.place.is_local:
                descriptor = os.open(folder.place.local / file, os.O_RDONLY)
                stack.callback(os.close, descriptor)
            else:
                spool = stack.enter_context(tempfile.TemporaryFile(prefix="embedloom-"))
                end = offset + folder.infos[name].nbytes
                for start in range(offset, end, _FETCH_BYTES):
                    spool.write(folder.place.read_range(file, start, min(end, start + _FETCH_BYTES)))
                spool.flush()
                descriptor, offset = spool.fileno(), 0
            readers.append(TensorReader(folder, name, descriptor, offset, scratch, slot))
        yield readers


# What a merge method is given: one tensor of every model, in blocks, and threads to go over them.


# Elements of a block: the float32 rows of a few models stay in a core's cache, and malloc hands the same pages out
# again (from half a megabyte on it gives them back to the system between blocks, which takes four times as long);
# the calls into torch still cost little beside the work.
_BLOCK = 2**16
_BLOCKS_HELD = 2**23  # elements of all models that a thread holds at once; more models, smaller blocks
_SMALLEST = 2**12

Result = TypeVar("Result")
# Elements ``start`` to ``stop`` of the merged tensor, float32; good until the same thread asks for the next.
BlockFunction = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Operands:
    """One floating tensor of all models (and of the base, where the method has one)."""

    name: str
    elements: int
    models: Sequence[TensorReader]  # in the order of the weights
    base: TensorReader | None
    threads: Executor | None  # None: in this thread

    @property
    def block(self) -> int:
        """Elements of a block: a power of two, decided by the number of models alone."""
        fitting = _BLOCKS_HELD // (len(self.models) + 1)
        return max(_SMALLEST, min(_BLOCK, 1 << (max(1, fitting).bit_length() - 1)))

    def reference(self) -> TensorReader:
        """The base.

        Raises:
            RuntimeError: a method that needs one was called without; the checks come before.
        """
        if self.base is None:
            raise RuntimeError(f"{self.name}: this method reads the base, and there is none")
        return self.base

    def each(self, work: Callable[[int, int], Result], blocks: int = 1) -> Iterator[Result]:
        """``work(start, stop)`` of every block, or of so many in a row; results in order, on any number of threads."""
        size = self.block * blocks
        starts = range(0, self.elements, size)
        stops = [min(start + size, self.elements) for start in starts]
        if self.threads is None:
            yield from map(work, starts, stops)
        else:
            yield from self.threads.map(work, starts, stops)

    def split(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The blocks of a row of blocks."""
        for first in range(start, stop, self.block):
            yield first, min(first + self.block, stop)
