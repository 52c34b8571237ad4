"""An engine starts where the GPU's memory is free, and says by name why it does not."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from embedloom.compute import vllm_engine
from embedloom.compute.vllm_engine import free_shares, wait_for_memory
from embedloom.config.synthesis import EngineOptions
from embedloom.errors import DataError, StageError


def test_an_engine_waits_until_the_lost_ones_memory_is_free():
    told = iter([{"0": 0.1, "1": 0.95}, {"0": 0.6, "1": 0.95}, {"0": 0.93, "1": 0.95}])
    slept: list[float] = []
    wait_for_memory(0.9, lambda: next(told), 60, slept.append)
    assert len(slept) == 2


def test_memory_that_is_never_free_is_said_with_the_gpu():
    slept: list[float] = []
    with pytest.raises(
        StageError, match=r"GPU 1 has 20% free after 10 s, and engine.gpu_memory_share is 0.9"
    ):
        wait_for_memory(0.9, lambda: {"0": 0.95, "1": 0.2}, 10, slept.append)
    assert sum(slept) == 10


def test_memory_is_asked_of_the_gpus_that_this_process_sees(monkeypatch: pytest.MonkeyPatch):
    driver = ModuleType("pynvml")
    driver.nvmlInit = driver.nvmlShutdown = lambda: None
    driver.nvmlDeviceGetHandleByIndex = lambda number: ("index", number)
    driver.nvmlDeviceGetHandleByUUID = lambda name: ("uuid", name)
    memory = {("index", 3): (20, 80), ("uuid", "GPU-ab"): (79, 80)}
    driver.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(
        free=memory[handle][0], total=memory[handle][1]
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    assert free_shares() == {"3": 0.25, "GPU-ab": 0.9875}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert free_shares() == {}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What vLLM's LLM is asked for; it then fails as it does where its own process cannot start on a GPU."""
    found: dict[str, object] = {}

    def fail(**options: object) -> None:
        found.update(options)
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")

    module = ModuleType("vllm")
    module.LLM = fail
    monkeypatch.setitem(sys.modules, "vllm", module)
    return found


def test_an_engine_core_that_does_not_start_is_our_error_by_name(asked: dict[str, object]):
    options = EngineOptions().for_model("openai/gpt-oss-20b")
    with pytest.raises(
        DataError, match=r"^/models/gpt-oss: vLLM's engine did not start .*core initialization failed"
    ):
        vllm_engine._load(Path("/models/gpt-oss"), options, True, 4)
    assert asked["distributed_executor_backend"] == "mp"
    assert asked["structured_outputs_config"]["reasoning_parser"] == "openai_gptoss"


def test_one_gpu_needs_no_executor(asked: dict[str, object]):
    with pytest.raises(DataError):
        vllm_engine._load(Path("/models/llama"), EngineOptions(), True, 1)
    assert "distributed_executor_backend" not in asked
    assert asked["structured_outputs_config"]["reasoning_parser"] == ""
