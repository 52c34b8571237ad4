"""Reading ranges of one stored tensor, so that no tensor has to be in memory as a whole.

Local files are read where they lie, by position and not by mapping: mapped pages would count as memory of this
process and stay until somebody else needs them. A tensor of an object store is fetched once, in large pieces, into
an unnamed file of the scratch disk and read there.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from embedloom.errors import DataError
from embedloom.merging.tensors import TensorFolder

_FETCH_BYTES = 32 * 2**20


class TensorReader:
    """One tensor as a flat row of elements; safe to use from several threads."""

    def __init__(self, folder: TensorFolder, name: str, descriptor: int, offset: int) -> None:
        self.info = folder.infos[name]
        self._where = f"{folder.place.uri}/{folder.where(name)[0]}"
        self._descriptor = descriptor
        self._offset = offset

    def raw(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` in the stored type.

        Raises:
            DataError: the file ends before ``stop``.
        """
        size = self.info.dtype.itemsize
        values = torch.empty((stop - start) * size, dtype=torch.uint8)
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
        return self.raw(start, stop).to(torch.float32)


@contextmanager
def open_tensors(folders: list[TensorFolder], name: str) -> Iterator[list[TensorReader]]:
    """The same tensor of several folders, for the ``with`` block."""
    with ExitStack() as stack:
        readers = []
        for folder in folders:
            file, offset = folder.where(name)
            if folder.place.is_local:
                descriptor = os.open(folder.place.local / file, os.O_RDONLY)
                stack.callback(os.close, descriptor)
            else:
                scratch = stack.enter_context(tempfile.TemporaryFile(prefix="embedloom-"))
                end = offset + folder.infos[name].nbytes
                for start in range(offset, end, _FETCH_BYTES):
                    scratch.write(folder.place.read_range(file, start, min(end, start + _FETCH_BYTES)))
                scratch.flush()
                descriptor, offset = scratch.fileno(), 0
            readers.append(TensorReader(folder, name, descriptor, offset))
        yield readers
