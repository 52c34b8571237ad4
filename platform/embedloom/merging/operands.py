"""What a merge method is given: one tensor of every model, in blocks, and threads to go over them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from embedloom.merging.reader import TensorReader

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
