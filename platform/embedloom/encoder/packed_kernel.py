"""Packed attention in one compiled loop (_attention.c) for CPUs, where no gradient is wanted.

torch has no attention for texts of several lengths on CPU. Through sdpa, length by length, it took 13 to 17 % of a forward
of MiniLM in some six hundred calls; here it takes one a layer, and a quarter (short texts, bfloat16) to nine tenths (2,048
tokens, float32) of the time (``benchmarks/attention.py``).
"""

import ctypes
import functools
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

_LARGEST_HEAD = 256  # dimensions; MAX_D in _attention.c
_FEWEST_LANES = 8  # AVX2; with vectors of 4, sdpa is up to 3.5 times as fast


@functools.cache
def load_kernel() -> ModuleType | None:
    """The compiled loop, or None where it was not built or the CPU has neither AVX2 nor AVX-512."""
    try:
        kernel = importlib.import_module("embedloom.encoder._attention")
    except ImportError:
        return None
    return kernel if kernel.lanes(16) >= _FEWEST_LANES else None


@functools.cache
def parallel_address() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses; 0 where it has another interface."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0


def kernel_for(query: Tensor, key: Tensor, value: Tensor) -> ModuleType | None:
    """The compiled loop if it computes these: [1, heads, tokens, d] on CPU, float32 or bfloat16, no gradient."""
    sides = (query, key, value)
    if torch.is_grad_enabled() or any(side.device.type != "cpu" for side in sides):
        return None
    if query.dtype not in (torch.float32, torch.bfloat16) or any(side.dtype != query.dtype for side in sides):
        return None
    d = query.shape[3]
    if d % 16 or d > _LARGEST_HEAD or any(side.stride(3) != 1 or side.shape[3] != d for side in sides):
        return None
    return load_kernel()


def attend_packed(
    kernel: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]],
    causal: bool,
    scaling: float | None,
) -> Tensor:
    """Attention inside each text.

    Args:
        kernel: from ``kernel_for`` these tensors.
        query: [1, heads, tokens, d].
        key: [1, kv_heads, tokens, d]; heads are a multiple of kv_heads.
        value: as ``key``.
        lengths: tokens of the texts, which lie behind one another; their sum is ``tokens``.
        causal: whether a token sees only itself and what is before it.
        scaling: of the scores; None: 1 / sqrt(d).

    Returns:
        [1, tokens, heads, d] in the dtype of ``query``.
    """
    _, heads, tokens, d = query.shape
    out = torch.empty((tokens, heads, d), dtype=query.dtype)
    kernel.attention(
        out.data_ptr(),
        *((side.data_ptr(), side.stride(1), side.stride(2)) for side in (query, key, value)),
        lengths,
        tokens,
        heads,
        key.shape[1],
        d,
        d**-0.5 if scaling is None else scaling,
        causal,
        query.dtype == torch.bfloat16,
        parallel_address(),
        torch.get_num_threads(),
    )
    return out.unsqueeze(0)
