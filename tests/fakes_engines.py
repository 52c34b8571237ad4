"""Engines and shard workers that stand in for slow, random or broken ones."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from embedloom.compute.generation import EngineLostError, GenerationRequest, GenerationResult
from embedloom.config.synthesis import EngineOptions
from embedloom.errors import DataError, MissingDependency
from fakes import byte_tokenizer

_WORDS = (
    "about after again almost along always another answer around because before better between bring build carry "
    "change choose clear close common course cover cross decide describe differ direct double draw early enough every "
    "example family father figure follow force forest friend garden general govern great ground happen heavy history "
    "house hundred idea island kind knowledge language large learn letter light little machine matter measure minute "
    "morning mother mountain nature never north notice number object often order paper pattern people perhaps person "
    "picture place plant point power present problem product question quick reach ready reason receive record remember "
    "river road round science second sentence several short simple something special stand start state still story "
    "street strong study summer surface system table teach thought thousand through together toward travel under "
    "usual valley value village voice water weather wheel whether white winter wonder world write yellow young"
)
WORDS = _WORDS.split()


class FakeEngine:
    """Answers at once with JSON of the schema that is asked for; its texts are drawn by the request's seed alone.

    Messages that contain "refuse" get an engine error, "ramble" a cut answer, "mumble" no JSON.
    """

    def __init__(
        self, *, model_folder: Path, options: EngineOptions, threads: int, gpu: bool, tensor_parallel: int
    ) -> None:
        self.folder = model_folder

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: GenerationRequest) -> GenerationResult:
        text = request.messages[-1]["content"]
        if "refuse" in text:
            return GenerationResult.failed(request, "prompt has 9 tokens, 8 fit")
        if "ramble" in text:
            return GenerationResult(request.id, '{"query": "What is', "length", 7, request.max_tokens)
        if "mumble" in text:
            return self._mumble(request)
        assert request.json_schema is not None
        answer = fake_value(request.json_schema, random.Random(request.seed))
        return GenerationResult(request.id, json.dumps(answer), "stop", 7, 5)

    def _mumble(self, request: GenerationRequest) -> GenerationResult:
        return GenerationResult(request.id, "mmm", "stop", 7, 3)


def fake_value(schema: dict[str, Any], draw: random.Random) -> Any:
    """A value of a JSON schema of objects, lists, enums and texts without patterns."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if schema["type"] == "object":
        return {key: fake_value(value, draw) for key, value in schema["properties"].items()}
    if schema["type"] == "array":
        return [fake_value(schema["items"], draw) for _ in range(schema["minItems"])]
    if schema["type"] in ("integer", "number"):
        return draw.randint(schema.get("minimum", 1), schema.get("maximum", 10))
    assert "pattern" not in schema, "the fake knows no patterns; use a generator without small: true"
    limit = schema.get("maxLength", 100) - 1
    words = " ".join(draw.choices(WORDS, k=12))
    return words[: min(limit, 70)].rsplit(maxsplit=1)[0]


class MumblingEngine(FakeEngine):
    """Mumbles three answers of ten, by seed."""

    def _answer(self, request: GenerationRequest) -> GenerationResult:
        return self._mumble(request) if request.seed % 10 < 3 else super()._answer(request)


class MuteEngine(FakeEngine):
    """Never writes anything usable."""

    def _answer(self, request: GenerationRequest) -> GenerationResult:
        return GenerationResult(request.id, "", "stop", 7, 0)


class CrashingEngine(FakeEngine):
    """Takes its process with it on the second batch it sees, once."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        first, crashed = self.folder / "first", self.folder / "crashed"
        if first.exists() and not crashed.exists():
            crashed.touch()
            os._exit(1)
        first.touch()
        return super().generate(requests)


class LostEngine(FakeEngine):
    """Is lost on a batch that holds a message with "poison", every time."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        if any("poison" in request.messages[-1]["content"] for request in requests):
            raise EngineLostError("the engine died with 1 requests: RuntimeError: poisoned")
        return super().generate(requests)


class ParentEngine(FakeEngine):
    """As vLLM on a GPU: the engine is a child that outlives its parent, and the first one is lost on its first batch.

    ``killed`` ends the actor from outside, as an out-of-memory killer does. Each start notes which earlier children live.
    """

    killed = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        alive = [
            int(path.name) for path in (self.folder / "children").glob("*") if is_running(int(path.name))
        ]
        (self.folder / "starts").mkdir(exist_ok=True)
        (self.folder / "starts" / f"{time.monotonic_ns()}").write_text(json.dumps(alive))
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (self.folder / "children").mkdir(exist_ok=True)
        (self.folder / "children" / str(self.child.pid)).touch()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        if not (self.folder / "lost").exists():
            (self.folder / "lost").touch()
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise EngineLostError("the engine died with 1 requests: RuntimeError: CUDA error")
        return super().generate(requests)


class KilledParentEngine(ParentEngine):
    """Its actor is killed, so nothing in it can end the child."""

    killed = True


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class DoublingWorker:
    """Doubles the column ``n``; leaves a note of every call, so a test can see what was computed again.

    ``trouble``: "crash" ends the process once, "user" and "other" raise, "start" raises in the constructor,
    "order" names the done folder first.
    """

    def __init__(self, notes: str, trouble: str = "") -> None:
        self.notes = Path(notes)
        self.trouble = trouble
        if trouble == "start":
            raise MissingDependency("warp-drive", "cpu", "doubling")

    def __call__(self, rows: pa.Table) -> dict[str, pa.Table]:
        (self.notes / f"call-{uuid.uuid4()}").touch()
        numbers: list[Any] = rows.column("n").to_pylist()
        if self.trouble == "crash" and not (self.notes / "crashed").exists():
            (self.notes / "crashed").touch()
            os._exit(1)
        if self.trouble == "user" and 7 in numbers:
            raise DataError("row 7: column 'n' is 7, allowed: anything else")
        if self.trouble == "other" and 7 in numbers:
            raise RuntimeError("the accelerator is on fire")
        doubled = pa.table({"n": [2 * n for n in numbers]})
        odd = pa.table({"n": pa.array([n for n in numbers if n % 2], pa.int64())})
        if self.trouble == "order":
            return {"done": doubled, "odd": odd}
        return {
            "odd": odd,
            "copy": doubled,
            "done": doubled,
        }  # equal tables: equally long bytes between the steps


def make_tiny_generator(folder: Path) -> Path:
    """Save a random causal Llama whose heads are wide enough for vLLM's CPU kernels, with a chat template."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
