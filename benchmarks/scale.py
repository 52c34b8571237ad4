"""Whether the corpus stage is linear and its driver flat: CPU a document, peak memory of driver and worker, files, by size.

    python benchmarks/scale.py [--rows 50000,200000,800000] [--large] [--chunk MODEL] [--json]

Made-up documents of about 600 characters, words drawn by Zipf's law, 2 % exact and 5 % near copies, in Parquet files of
50,000. The driver hands its tasks to one worker process (``concurrent.futures`` in place of Ray, same contract), so the CPU
time of both, imports left out, and the peak of each are exact. Every size runs in a process of
its own. The last lines say whether CPU a document stays within 15 % and the driver within 100 MB. --large adds 5 million.
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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


def _imported() -> float:
    import embedloom.corpus.stage  # noqa: F401

    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Worker:
    """One process that does all tasks, in the way of ``run_tasks``."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(
        self, stage: str, function: Callable[..., Any], items: Sequence[Any], *shared: Any, **_: Any
    ) -> Iterator[Any]:
        """Results in order; one task waits at a time, so that the driver holds no more."""
        return (self._pool.submit(function, item, *shared).result() for item in items)

    def start(self) -> float:
        """Have it import what tasks need; the CPU seconds that this took, the same at any size."""
        return self._pool.submit(_imported).result()

    def peak(self) -> float:
        """The most memory that the process has held, in bytes."""
        return self._pool.submit(peak_bytes).result()

    def close(self) -> None:
        """End the process, which makes its use of the machine known."""
        self._pool.shutdown()


def measure(folder: Path, rows: int, model: str | None) -> dict[str, float]:
    """Build one corpus; CPU seconds and peaks of this process and its worker."""
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
    worker = Worker()
    started = worker.start()
    before = resource.getrusage(resource.RUSAGE_SELF)
    out = ArtefactWriter(Place(str(folder / "out")), "corpus", "scale", {}, "local")
    artefact = stage.build_corpus(config, 0, NodeModel(model or "none"), out, worker)
    worker_peak = worker.peak()
    worker.close()
    own, child = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    driver = own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime
    counts = artefact.counts
    return {
        "rows": rows, "us_a_document": (driver + child.ru_utime + child.ru_stime - started) / rows * 1e6,
        "driver_us_a_document": driver / rows * 1e6, "driver_peak_mb": peak_bytes() / 1e6,
        "worker_peak_mb": worker_peak / 1e6, "files": len(artefact.place.files()),
        "exact": counts["rejects"].get("duplicate", 0), "near": counts["rejects"].get("near_duplicate", 0),
    }  # fmt: skip


def run_size(rows: int, model: str | None) -> dict[str, float]:
    """Make and build one size, in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        make_documents(Path(folder) / "in", rows)
        command = [sys.executable, __file__, "--one", folder, "--rows", str(rows)]
        found = subprocess.run(
            [*command, *(["--chunk", model] if model else [])], check=True, stdout=subprocess.PIPE
        )
        return dict(json.loads(found.stdout.splitlines()[-1]))


def main() -> None:
    """Run all sizes and judge them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(map(str, SIZES)), help="sizes, between commas")
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,}")
    parser.add_argument("--chunk", help="model whose tokenizer cuts; without it documents stay whole")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.rows.split(",")] + [LARGE] * arguments.large
    if arguments.one:
        print(json.dumps(measure(Path(arguments.one), sizes[0], arguments.chunk)))
        return
    results = []
    for size in sizes:
        results.append(run_size(size, arguments.chunk))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    costs, peaks = ([one[name] for one in results] for name in ("us_a_document", "driver_peak_mb"))
    verdict = {
        "cpu_spread": round(max(costs) / min(costs) - 1, 3), "driver_spread_mb": round(max(peaks) - min(peaks), 1),
        "linear": max(costs) <= (1 + CPU_SPREAD) * min(costs), "flat": (max(peaks) - min(peaks)) * 1e6 <= DRIVER_SPREAD,
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({"sizes": results, **verdict}))
        return
    print(
        "| documents | CPU a document | of it the driver | driver's peak | worker's peak | files | exact | near |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for one in results:
        print(
            f"| {one['rows']:,} | {one['us_a_document']:.0f} us | {one['driver_us_a_document']:.1f} us | "
            f"{one['driver_peak_mb']:.0f} MB | {one['worker_peak_mb']:.0f} MB | {one['files']} | {one['exact']:,} | {one['near']:,} |"
        )
    print(verdict)


if __name__ == "__main__":
    main()
