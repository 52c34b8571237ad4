"""Keeps the memory of a serving process, which sees every mix of lengths there is, from growing with that variety."""

import ctypes
import os
import time
from collections.abc import Callable

# oneDNN compiles every product for its shape and by default keeps the last 1,024 of them. A forward pass of one shape
# needs about ten, the same in every layer. Measured on MiniLM over 1,500 random batches: 738 MiB with the default, 648
# with 64, 601 with 16, speeds within 3 %.
_COMPILED_PRODUCTS = "64"
TRIM_SECONDS = 10.0


def limit_compiled_products() -> None:
    """Bound oneDNN's cache; only before the process's first product, as it is read once."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _COMPILED_PRODUCTS)


class HeapTrimmer:
    """Gives free pages inside the heap back to the system every ten seconds.

    Batches of changing sizes leave holes between what is kept: 90 to 130 MiB of 640 after 1,200 random batches, which
    glibc returns only when asked. Asking took 11 ms, a thousandth of the time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        self._last = clock()

    def after_batch(self) -> bool:
        """Trim if it is time; says whether it was."""
        if self._trim is None or self._clock() - self._last < TRIM_SECONDS:
            return False
        self._trim(0)
        self._last = self._clock()
        return True
