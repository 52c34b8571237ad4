"""Reading ranges of one stored tensor, so that no tensor has to be in memory as a whole.

Local files are read where they lie, by position and not by mapping: mapped pages would count as memory of this
process and stay until somebody else needs them. A tensor of an object store is fetched once, in large pieces, into
an unnamed file of the scratch disk and read there.
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from embedloom.errors import DataError
from embedloom.merging.tensors import TensorFolder

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
