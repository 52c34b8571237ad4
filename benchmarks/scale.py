"""Whether data stages are linear and their driver flat: CPU a row, peak memory of driver and worker, files, by size.

    python benchmarks/scale.py [--stages corpus,gather,...] [--rows 50000,200000,800000] [--large] [--chunk MODEL] [--json]

corpus: made-up documents of about 600 characters, words drawn by Zipf's law, 2 % exact and 5 % near copies, in Parquet files of
50,000. The others, with made-up teachers, generators and models, are in ``scale_stages.py``. The driver hands its tasks to one
worker process (``concurrent.futures`` in place of Ray, same contract), so the CPU time of both, imports left out, and the peak
of each are exact. Every size runs in a process of its own. The last lines say whether CPU a row stays within 15 % and the driver
within 100 MB. --large adds 5 million.
"""

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scale_stages

SIZES = (50_000, 200_000, 800_000)
LARGE = 5_000_000
FILE_ROWS = 50_000
WORDS, MEAN_WORDS = 60_000, 95
EXACT, NEAR = 0.02, 0.05
CPU_SPREAD, DRIVER_SPREAD = 0.15, 100e6


def make_documents(folder: Path, rows: int) -> None:
    """Parquet files of made-up documents, the same for the same number."""
    random = np.random.default_rng(rows)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(random.choice(letters, size)) for size in random.integers(2, 11, WORDS)])
    weights = 1 / np.arange(10, WORDS + 10)
    folder.mkdir(parents=True)
    for start in range(0, rows, FILE_ROWS):
        count = min(FILE_ROWS, rows - start)
        lengths = np.maximum(12, random.gamma(2.0, MEAN_WORDS / 2, count)).astype(int)
        drawn = words[random.choice(WORDS, int(lengths.sum()), p=weights / weights.sum())]
        texts = [" ".join(own) for own in np.split(drawn, np.cumsum(lengths)[:-1])]
        for place, kind in enumerate(random.random(count)):
            if place and kind < EXACT + NEAR:
                text = texts[int(random.integers(place))]
                texts[place] = text.upper() if kind < EXACT else f"{text} {words[place % WORDS]}"
        pq.write_table(
            pa.table({"text": texts}), folder / f"{start // FILE_ROWS:05d}.parquet", row_group_size=8192
        )


def peak_bytes() -> float:
    """The most memory that this process has held; ``ru_maxrss`` would count what its parent held before the exec as well."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")
    )
    return float(line.split()[1]) * 1024


def cpu_seconds() -> float:
    """That this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _imported() -> float:
    # Everything that a task may import, so that what is measured is work.
    import embedloom.corpus.stage
    import embedloom.mining.stage
    import embedloom.retrieval.corpora
    import embedloom.synthesis.stage
    import embedloom.training.data  # noqa: F401

    return cpu_seconds()


_CONTENT: dict[int, Any] = {}  # of the worker's process: what tasks of one step share, opened once


def _called(content: bytes, item: bytes) -> Any:
    key = hash(content)
    if key not in _CONTENT:
        _CONTENT.clear()
        _CONTENT[key] = cloudpickle.loads(content)
    function, shared = _CONTENT[key]
    return function(cloudpickle.loads(item), *shared)


class Worker:
    """One process that does all tasks, in the way of ``run_tasks``."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(
        self, stage: str, function: Callable[..., Any], items: Sequence[Any], *shared: Any, **_: Any
    ) -> Iterator[Any]:
        """Results in order; one task waits at a time, so that the driver holds no more."""
        # By value, as Ray has it: stages hand closures, and functions of this program.
        content = cloudpickle.dumps((function, shared))
        return (self._pool.submit(_called, content, cloudpickle.dumps(item)).result() for item in items)

    def replace_ray(self) -> None:
        """Have the stages that were imported use this process."""
        scale_stages.replace_ray(self)

    def start(self) -> float:
        """Have it import what tasks need; the CPU seconds that this took, the same at any size."""
        return self._pool.submit(_imported).result()

    def used(self) -> float:
        """CPU seconds of the process so far; its end, a second with torch in it, is not counted."""
        return self._pool.submit(cpu_seconds).result()

    def peak(self) -> float:
        """The most memory that the process has held, in bytes."""
        return self._pool.submit(peak_bytes).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def run_corpus(folder: Path, rows: int, worker: "Worker", model: str | None) -> dict[str, float]:
    """Build a corpus; what it found."""
    from embedloom.config.corpus import CorpusConfig
    from embedloom.core.artefacts import ArtefactWriter
    from embedloom.core.storage import Place
    from embedloom.corpus import stage
    from embedloom.encoder.registry import NodeModel

    stage._SMALL_BYTES = 0  # the same way for all sizes
    config = CorpusConfig.model_validate(
        {
            "sources": [{"format": "parquet", "path": str(folder / "in")}],
            "chunk_tokens": 512 if model else None,
        }
    )
    out = ArtefactWriter(Place(str(folder / "out")), "corpus", "scale", {}, "local")
    counts = stage.build_corpus(config, 0, NodeModel(model or "none"), out, worker).counts
    return {
        "exact": counts["rejects"].get("duplicate", 0),
        "near": counts["rejects"].get("near_duplicate", 0),
    }


def measure(stage: str, folder: Path, rows: int, model: str | None) -> dict[str, Any]:
    """Run one stage; CPU seconds and peaks of this process and its worker."""
    worker = Worker()
    started = worker.start()
    _imported()
    there = {path for path in folder.rglob("*") if path.is_file()}
    before = cpu_seconds()
    found: dict[str, float] = {}
    if stage == "corpus":
        found = run_corpus(folder, rows, worker, model)
    else:
        scale_stages.STAGES[stage][1](folder, rows, worker)
    worker_peak, worked = worker.peak(), worker.used() - started
    worker.close()
    driver = cpu_seconds() - before
    return {
        "stage": stage, "rows": rows, "us_a_row": (driver + worked) / rows * 1e6,
        "driver_us_a_row": driver / rows * 1e6, "driver_peak_mb": peak_bytes() / 1e6, "worker_peak_mb": worker_peak / 1e6,
        "files": len({path for path in folder.rglob("*") if path.is_file()} - there), **found,
    }  # fmt: skip


def run_size(stage: str, rows: int, model: str | None) -> dict[str, Any]:
    """Make and run one size, in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        if stage == "corpus":
            make_documents(Path(folder) / "in", rows)
        else:
            scale_stages.STAGES[stage][0](Path(folder), rows)
        command = [sys.executable, __file__, "--one", folder, "--stages", stage, "--rows", str(rows)]
        found = subprocess.run(
            [*command, *(["--chunk", model] if model else [])], check=True, stdout=subprocess.PIPE
        )
        return dict(json.loads(found.stdout.splitlines()[-1]))


def verdict(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether a stage is linear and its driver flat."""
    costs, peaks = ([one[name] for one in results] for name in ("us_a_row", "driver_peak_mb"))
    return {
        "cpu_spread": round(max(costs) / min(costs) - 1, 3), "driver_spread_mb": round(max(peaks) - min(peaks), 1),
        "linear": max(costs) <= (1 + CPU_SPREAD) * min(costs), "flat": (max(peaks) - min(peaks)) * 1e6 <= DRIVER_SPREAD,
    }  # fmt: skip


def main() -> None:
    """Run all sizes and judge them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ["corpus", *scale_stages.STAGES]
    parser.add_argument("--stages", default=",".join(known), help=f"between commas: {', '.join(known)}")
    parser.add_argument("--rows", default=",".join(map(str, SIZES)), help="sizes, between commas")
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,}")
    parser.add_argument(
        "--chunk", help="model whose tokenizer cuts the corpus; without it documents stay whole"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.rows.split(",")] + [LARGE] * arguments.large
    stages = arguments.stages.split(",")
    if arguments.one:
        print(json.dumps(measure(stages[0], Path(arguments.one), sizes[0], arguments.chunk)))
        return
    results: dict[str, list[dict[str, Any]]] = {stage: [] for stage in stages}
    for stage in stages:
        for size in sizes:
            results[stage].append(run_size(stage, size, arguments.chunk))
            print(json.dumps(results[stage][-1]), file=sys.stderr, flush=True)
    verdicts = {stage: verdict(own) for stage, own in results.items()}
    if arguments.json:
        print(json.dumps({"sizes": results, "verdicts": verdicts}))
        return
    print(
        "| stage | rows | CPU a row | of it the driver | driver's peak | worker's peak | files |\n|---|---|---|---|---|---|---|"
    )
    for one in (one for own in results.values() for one in own):
        print(
            f"| {one['stage']} | {one['rows']:,} | {one['us_a_row']:.1f} us | {one['driver_us_a_row']:.2f} us | "
            f"{one['driver_peak_mb']:.0f} MB | {one['worker_peak_mb']:.0f} MB | {one['files']} |"
        )
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main()
