"""What this machine's CPU computes in hardware, as Linux states it."""

from pathlib import Path

_FAST_BF16 = {"avx512_bf16", "amx_bf16"}


def cpu_flags(cpuinfo: str | None = None) -> set[str]:
    """Instruction sets of the CPU.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``; None: this machine's, empty where there is none.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.is_file() else ""
    return set(next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split())


def has_bf16_instructions(cpuinfo: str | None = None) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; emulated it is several times slower than float32."""
    return bool(_FAST_BF16 & cpu_flags(cpuinfo))
