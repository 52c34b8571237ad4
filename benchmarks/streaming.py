"""Object store used by synthesis and mining in one streamed pipeline, beside the same stages one after the other.

    python benchmarks/streaming.py [--quick] [--json] [--rows N ...]

Work: the quickstart's synthesis (SmolLM2-135M in vLLM writes queries) and mining (MiniLM as teacher) over the
docstrings of networkx, cut down; the corpus is built before the clock starts. Every run is a process with a Ray of
its own: streamed (profile option ``streaming: true``) and staged at every number of rows. Candidates must be the
same, scores to the last bits; documents closer than that may trade ranks, which are counted. Ours and the peer's are
the peak of the bytes in the object store during synthesis (there alone the two differ) at the most rows;
``work.sides`` has peak and seconds of every stage at every size, so that growth with the rows shows.

The reading is the raylet's own count, asked for ten times a second: it sees a put at once and a release within two
seconds, where Ray's Prometheus export lags by ten. What lives between two readings is in ``created_mb``, everything
that was ever put there, which no peak can pass. Ray keeps results below 100 KiB out of the store, in their owner's
heap; here they go into it too (``RAY_max_direct_call_object_size``), so that nothing that passes between the pools
is left out. ``--inlined`` leaves them where Ray has them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "corpus.sources.0.packages=[networkx]",
    "synthesis.families.0.max_document_characters=160",
    "synthesis.families.0.max_new_tokens=32",
    "synthesis.expected_acceptance=0.7",
    "synthesis.shard_rows=8",
    "mining.teachers=[{model: minilm-l6, dtype: float32}]",
    "mining.shard_rows=128",
)
STAGES = ("synthesis", "mining")
SCORE_TOLERANCE = 1e-5  # texts beside it in a batch change a vector's last bits
PERIOD_SECONDS = 0.1


class StoreReading:
    """Bytes in the object store of one Ray node, by its raylet's own count."""

    def __init__(self) -> None:
        import ray
        from ray._private.internal_api import get_memory_info_reply

        node = ray.nodes()[0]
        self._address = node["NodeManagerAddress"], node["NodeManagerPort"]
        self._ask = get_memory_info_reply
        self._peak = 0
        self._readings = 0

    def now(self) -> Any:
        """Ray's counters at this moment."""
        stats = self._ask(None, *self._address).store_stats
        self._peak = max(self._peak, stats.object_store_bytes_used)
        self._readings += 1
        return stats

    @contextmanager
    def watched(self) -> Iterator[dict[str, float]]:
        """Fill the yielded dict at the end of the block with what it did to the store, and its seconds."""
        found: dict[str, float] = {}
        ended = threading.Event()
        started, before = time.perf_counter(), self.now()
        self._peak = self._readings = 0
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        watcher.start()
        try:
            yield found
        finally:
            ended.set()
            watcher.join()
            after = self.now()
            found.update(
                seconds=round(time.perf_counter() - started, 1),
                peak_mb=megabytes(self._peak),
                created_mb=megabytes(after.cumulative_created_bytes - before.cumulative_created_bytes),
                spilled_mb=megabytes(after.spilled_bytes_total - before.spilled_bytes_total),
                readings=self._readings,
            )

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(PERIOD_SECONDS):
            self.now()


def megabytes(count: float) -> float:
    return round(count / 1e6, 3)


def run_side(streamed: bool, rows: int, folder: Path) -> None:
    """Both stages in this process as driver, and what they did to the store."""
    from embedloom.cluster.session import ray_session
    from embedloom.config.cluster import AuthConfig, Profile
    from embedloom.config.run import Inputs
    from embedloom.pipeline.commands import load
    from embedloom.pipeline.graph import build_nodes, graph

    overrides = [*SETTINGS, f"synthesis.families.0.rows={rows}", f"run.output_dir={folder}"]
    run = load(ROOT / "jobs/configs/quickstart.yaml", "local", ROOT / "cluster/cluster.yaml", overrides)
    profile = Profile.model_validate({**run.profile.model_dump(), "streaming": streamed})
    run = replace(run, cluster=run.cluster.model_copy(update={"profiles": {"local": profile}}))
    nodes, done = graph(run), Inputs()
    found: dict[str, Any] = {"store_mb": megabytes(profile.object_store_mib * 2**20)}
    with ray_session(profile, AuthConfig(token_path=str(folder / "token"))):
        build_nodes(run, nodes, ["corpus"], done)
        store = StoreReading()
        for name in STAGES:
            with store.watched() as found[name]:
                build_nodes(run, nodes, [name], done)
    found["parts"] = len(done["synthesis"].place.names("pairs", ".parquet"))
    candidates = done["mining"].place.read_tables("candidates", "candidates")
    with (
        pa.OSFile(str(folder / "candidates.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, candidates.schema) as out,
    ):
        out.write_table(candidates)
    print(json.dumps(found))


def child(side: str, rows: int, folder: Path, inlined: bool) -> dict[str, Any]:
    """One side in a process of its own."""
    folder.mkdir()
    environment = {} if inlined else {"RAY_max_direct_call_object_size": "0"}
    run = subprocess.run(
        [sys.executable, __file__, "--side", side, "--rows", str(rows), "--folder", str(folder)],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    found = dict(json.loads(run.stdout.splitlines()[-1]))
    sys.stderr.write(f"{side}, {rows} rows: {found}\n")
    return found


def candidate_difference(one: Path, other: Path) -> dict[str, float] | None:
    """The widest difference of a document's score, and the ranks at which two runs name different documents.

    A document that only one run kept is measured against the other's last score. None: other queries.
    """
    left, right = (pa.ipc.open_file(folder / "candidates.arrow").read_all() for folder in (one, other))
    ranked = ["document_ids", "scores"]
    if not left.drop_columns(ranked).equals(right.drop_columns(ranked)):
        return None
    widest, moved = 0.0, 0
    for mine, theirs in zip(*(table.select(ranked).to_pylist() for table in (left, right)), strict=True):
        known = [dict(zip(row["document_ids"], row["scores"], strict=True)) for row in (mine, theirs)]
        lowest = [min(scores.values()) for scores in known]
        for name in known[0].keys() | known[1].keys():
            score, other_score = (known[n].get(name, lowest[n]) for n in (0, 1))
            widest = max(widest, abs(score - other_score))
        moved += sum(a != b for a, b in zip(mine["document_ids"], theirs["document_ids"], strict=True))
    return {"score": widest, "moved": moved, "candidates": sum(map(len, left.column("scores")))}


def compare(sizes: list[int], inlined: bool) -> dict[str, Any]:
    sides: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, float] | None] = {}
    with tempfile.TemporaryDirectory(prefix="el-", dir="/tmp") as name:
        for rows in sizes:
            folders = {side: Path(name) / f"{side}-{rows}" for side in ("streamed", "staged")}
            sides[str(rows)] = {side: child(side, rows, folder, inlined) for side, folder in folders.items()}
            differences[str(rows)] = candidate_difference(*folders.values())
    ours, theirs = (sides[str(max(sizes))][side]["synthesis"]["peak_mb"] for side in ("streamed", "staged"))
    return {
        "name": "streaming",
        "ours": ours,
        "peer": theirs,
        "peer_name": "the same stages one after the other",
        "ratio": round(theirs / ours, 3) if ours else 1.0,
        "unit": "MB at most in the object store",
        "equal": all(d is not None and d["score"] <= SCORE_TOLERANCE for d in differences.values()),
        "work": {"rows": sizes, "differences": differences, "small_results_in_store": not inlined, "sides": sides},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small size; five minutes, as engines start all the same"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument(
        "--rows", type=int, nargs="+", help="rows that synthesis writes, one run of each side"
    )
    parser.add_argument("--inlined", action="store_true", help="leave small results in their owner's heap")
    parser.add_argument("--side", choices=["streamed", "staged"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side == "streamed", options.rows[0], options.folder)
        return
    sizes = options.rows or ([48] if options.quick else [64, 256])
    result = compare(sizes, options.inlined)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
