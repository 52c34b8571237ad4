"""What this process can compute with."""

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from embedloom.errors import ConfigError

DTypeName = Literal["auto", "float32", "bfloat16", "int8"]  # int8: linear layers only (int8.py), on CPU
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}


def pick_device(name: str = "auto") -> torch.device:
    """``auto``: the GPU Ray gave this process, else the CPU.

    Raises:
        ConfigError: a CUDA device is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {name!r} is asked for, but torch sees no CUDA device; allowed here: 'auto', 'cpu'"
        )
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware; emulated ones are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(_BF16_CPU_FLAGS & _cpu_flags())


def as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over an array's memory, to be read only: arrays out of Parquet or Ray's object store are read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return set()
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return set(flags.split())


def pick_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where it is fast, else float32; so is all of ``int8`` but its linear layers."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
