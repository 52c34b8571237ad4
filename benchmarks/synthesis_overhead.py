"""Output tokens per second through the platform, beside a bare ``vllm.LLM.generate`` of the same engine.

    python benchmarks/synthesis_overhead.py [--quick] [--json] [--model smollm2-135m] [--in-flight 1 4]

Work: chat prompts of which each writes up to a drawn number of tokens; once all draw the same number, once a
long-tailed one (log-normal, up to eight times the median). One actor builds one engine, warms it up and lets
``LLM.generate`` write all prompts at once; then the same engine gets the same requests through the platform: read in
tasks, cut into shards, rendered, decoded, written as Parquet. The platform's clock runs from the actor being ready to
the last file. Texts of the two sides are compared.

Also the driver's peak memory for 1,000, 10,000 and 100,000 rows of a whole synthesis with an engine that answers at
once; it must not grow with the rows.
"""

import argparse
import itertools
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedloom.cluster.session import ray_session
from embedloom.compute.generation import (
    ANSWERS,
    GenerationRequest,
    GenerationResult,
    GenerationWorker,
    generation_arguments,
    read_requests,
    request_table,
)
from embedloom.compute.shards import Handling, run_sharded
from embedloom.compute.vllm_engine import VLLMEngine
from embedloom.config.cluster import AuthConfig, PoolConfig, Profile
from embedloom.config.synthesis import EngineOptions, SynthesisConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.schemas import table_from_rows
from embedloom.core.storage import Place
from embedloom.encoder.registry import resolve_model
from embedloom.synthesis.stage import synthesize

TOPICS = ("graphs", "rivers", "sorting", "bread", "moons", "databases", "sockets", "paint", "chess", "trees")
POOL = PoolConfig(cpus=1, threads=2)
WARM_UP = 32


def requests_of(lengths: str, count: int, median: int) -> list[GenerationRequest]:
    """Prompts of about a hundred tokens; ``lengths`` is uniform or long_tailed."""
    draw = np.random.default_rng(0)
    tail = np.minimum(np.exp(draw.normal(0, 0.9, count)), 8.0)
    limits = [median] * count if lengths == "uniform" else [max(4, round(median * float(t))) for t in tail]
    texts = [
        " ".join(f"Fact {m} about {TOPICS[(n + m) % len(TOPICS)]}: they matter a lot." for m in range(8))
        for n in range(count)
    ]
    return [
        GenerationRequest(
            f"{n}", ({"role": "user", "content": f"{text}\n\nContinue this text for as long as you can."},),
            n, limit, 0.7, 0.95,
        )
        for n, (text, limit) in enumerate(zip(texts, limits, strict=True))
    ]  # fmt: skip


class MeasuringWorker(GenerationWorker):
    """Times the bare engine once it is warm, then notes when it is ready for the platform."""

    def __init__(self, notes: str, requests: pa.Table, **arguments: Any) -> None:
        super().__init__(**arguments)
        asked = read_requests(requests)
        engine: Any = self._engine
        bare(engine, asked[:WARM_UP])
        started = time.time()
        texts, tokens = bare(engine, asked)
        note = {"seconds": time.time() - started, "tokens": tokens, "texts": texts, "ready": time.time()}
        Path(notes).write_text(json.dumps(note))


def bare(engine: Any, requests: list[GenerationRequest]) -> tuple[list[str], int]:
    """Texts and output tokens of one ``LLM.generate``; the platform's loop sleeps meanwhile."""
    from embedloom.compute.vllm_engine import _sampling

    prompts = [{"prompt_token_ids": engine._prompt_tokens(one)} for one in requests]
    outputs = engine._llm.generate(prompts, [_sampling(one) for one in requests], use_tqdm=False)
    written = [output.outputs[0] for output in outputs]
    return [one.text for one in written], sum(len(one.token_ids) for one in written)


def measure(model: Path, requests: list[GenerationRequest], in_flight: int, folder: Path) -> dict[str, Any]:
    """Both sides on one engine."""
    place = Place(str(folder))
    notes = folder / "bare.json"
    table = request_table(requests)
    place.write_table("requests/part-000000.parquet", table)
    arguments = generation_arguments(lambda: model, EngineOptions(), POOL, VLLMEngine)
    run_sharded(
        stage="bench", source=place, source_folder="requests", output=place, done_folder="texts",
        shard_rows=max(1, len(requests) // 4), worker=MeasuringWorker,
        worker_arguments={"notes": str(notes), "requests": table, **arguments}, pool=POOL,
        handling=Handling(
            finish=lambda tables: {"texts": tables[ANSWERS].select(["answer", "output_tokens"])}, in_flight=in_flight
        ),
    )  # fmt: skip
    done = max(path.stat().st_mtime for path in (folder / "texts").glob("*.parquet"))
    peer = json.loads(notes.read_text())
    written = place.read_tables("texts")
    tokens = sum(written.column("output_tokens").to_pylist())
    same = [a == b for a, b in zip(written.column("answer").to_pylist(), peer["texts"], strict=True)]
    ours, theirs = tokens / (done - peer["ready"]), peer["tokens"] / peer["seconds"]
    return {
        "ours": round(ours, 1), "peer": round(theirs, 1), "ratio": round(ours / theirs, 3),
        "output_tokens": tokens, "same_texts": round(sum(same) / len(same), 3),
    }  # fmt: skip


class InstantEngine:
    """Answers at once with a query made of the request's seed."""

    def __init__(self, **arguments: Any) -> None:
        pass

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Write one JSON answer per request."""
        return [self._answer(one) for one in requests]

    def _answer(self, request: GenerationRequest) -> GenerationResult:
        draw = random.Random(request.seed)
        text = " ".join(f"{draw.choice(TOPICS)}{draw.randrange(10**6)}" for _ in range(8))
        return GenerationResult(request.id, json.dumps({"queries": [text]}), "stop", 100, 30)


def synthesize_fakes(rows: int) -> dict[str, float]:
    """A whole synthesis of so many rows in this process as driver; its peak memory once Ray is up and at the end."""
    section = SynthesisConfig.model_validate(
        {
            "generators": [{"model": "instant"}],
            "families": [{"family": "seed_queries", "rows": rows}],
            "quality": {"language": None, "contamination": None, "near_duplicates": None},
            "shard_rows": 500,
        }
    )
    with (
        tempfile.TemporaryDirectory(prefix="el-", dir="/tmp") as temporary,
        ray_session(Profile(logical_cpus=8), AuthConfig(token_path=f"{temporary}/token")),
    ):
        corpus = Place(f"{temporary}/corpus")
        writer = ArtefactWriter(corpus, "corpus", "c", {}, "local")
        for part in range(4):
            documents = [
                {"id": f"d{n}", "text": f"{TOPICS[n % len(TOPICS)]} number {n}", "source": "s"}
                for n in range(part * 1_000, part * 1_000 + 1_000)
            ]
            name = f"documents/train/part-{part:06d}.parquet"
            corpus.write_table(name, table_from_rows("documents", documents))
        out = ArtefactWriter(Place(f"{temporary}/out"), "synthesis", "c", {}, "local")
        models = {"instant": lambda: Path(temporary)}
        started = time.monotonic()
        done = synthesize(
            section, 1, writer.commit({}), PoolConfig(cpus=1), out, models, engine_factory=InstantEngine
        )
        seconds = time.monotonic() - started
    if done.counts["rows"] != rows:
        raise RuntimeError(f"{done.counts['rows']} rows were written, {rows} asked for")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": rows, "peak_mib": round(peak, 1), "seconds": round(seconds, 1)}


def driver_memory(rows: int) -> float:
    """Peak MiB of the driver of a synthesis of so many rows, in a process of its own."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--driver-of", str(rows)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(run.stdout.splitlines()[-1])["peak_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--in-flight", type=int, nargs="*", default=[1, 4], help="shards an actor decodes together"
    )
    parser.add_argument("--rows", type=int, nargs="*", help="of the memory runs; none: skip them")
    parser.add_argument("--driver-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.driver_of:
        print(json.dumps(synthesize_fakes(options.driver_of)))
        return
    count, median = (64, 24) if options.quick else (256, 32)
    model = resolve_model(options.model)
    found: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="el-", dir="/tmp") as temporary,
        ray_session(Profile(logical_cpus=8), AuthConfig(token_path=f"{temporary}/token")),
    ):
        for lengths, in_flight in itertools.product(("uniform", "long_tailed"), options.in_flight):
            name = f"{lengths}_{in_flight}"
            folder = Path(temporary) / name
            folder.mkdir()
            found[name] = measure(model, requests_of(lengths, count, median), in_flight, folder)
            sys.stderr.write(f"{name}: {found[name]}\n")
    sizes = (
        ([1_000, 4_000] if options.quick else [1_000, 10_000, 100_000])
        if options.rows is None
        else options.rows
    )
    memory = {str(rows): driver_memory(rows) for rows in sizes}
    first = next(iter(found.values()))
    result = {
        "name": "synthesis_overhead",
        "ours": first["ours"],
        "peer": first["peer"],
        "peer_name": "vllm.LLM.generate, the same engine",
        "ratio": first["ratio"],
        "unit": "output tokens/s",
        "equal": first["same_texts"] == 1.0,
        "work": {
            "model": options.model, "prompts": count, "median_tokens": median, "shards": math.ceil(count / max(1, count // 4)),
            "runs": found, "driver_peak_mib_by_rows": memory,
        },
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
