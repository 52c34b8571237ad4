"""The kill drill: `embedloom embed` killed with -9 at random points of its work must end with identical files.

    python tests/drills/embed_kills.py [--model MODEL] [--texts 3000] [--kills 10] [--seed 0] [--folder FOLDER]

Embeds made-up texts once undisturbed and once with kills of the whole process group, each at a drawn number of
finished files (before the first, while embedding, while filling in) and a drawn fraction of a second later, then
compares every byte of the two folders. Also fails if a finished file was written twice.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "read",
    "write",
    "parquet",
    "table",
    "column",
    "filter",
    "sort",
    "join",
    "merge",
    "array",
    "vector",
    "matrix",
    "socket",
    "thread",
    "queue",
    "lock",
]
SHARD_ROWS = 50
LIMIT_SECONDS = 600


def write_texts(path: Path, count: int, seed: int) -> None:
    """Texts of which about a tenth repeat an earlier one, and a few are empty."""
    draw = random.Random(seed)
    texts: list[str] = []
    for number in range(count):
        kind = draw.random()
        text = " ".join(draw.choices(WORDS, k=draw.randint(2, 9))) + f" {number}"
        texts.append(draw.choice(texts) if kind < 0.1 and texts else "" if kind > 0.998 else text)
    rows = ({"id": f"d{number:06d}", "text": text} for number, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(texts: Path, model: Path, out: Path, prefix: str) -> list[str]:
    """The command line of one run."""
    options = [
        "--model",
        str(model),
        "--out",
        str(out),
        "--set",
        f"shard_rows={SHARD_ROWS}",
        "--index",
        "hnsw",
    ]
    return [*shlex.split(prefix), sys.executable, "-m", "embedloom.cli", "embed", str(texts), *options]


def finished_files(out: Path) -> dict[str, int]:
    """When each finished vector file was written."""
    return {
        f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns
        for folder in ("own", "vectors")
        for path in (out / folder).glob("part-*.parquet")
    }


def run_until(arguments: list[str], out: Path, target: int, delay: float) -> tuple[bool, int]:
    """Start a run and kill its process group ``delay`` seconds after ``target`` files are finished.

    Returns whether the kill came before the end, and how many files were finished then.
    """
    process = subprocess.Popen(
        arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and len(finished_files(out)) < target:
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)
    time.sleep(delay)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for session in Path("/tmp").glob(f"el-ray-*/session_*_{process.pid}"):
        shutil.rmtree(session.parent, ignore_errors=True)
    return alive, len(finished_files(out))


def differences(left: Path, right: Path) -> list[str]:
    """Names of files that only one folder has or whose bytes differ; of the manifest, the times do not count."""
    names = {p.relative_to(root).as_posix() for root in (left, right) for p in root.rglob("*") if p.is_file()}

    def content(path: Path) -> bytes | None:
        if path.name == "manifest.json" and path.is_file():
            kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "created")}
            return json.dumps(kept, sort_keys=True).encode()
        return path.read_bytes() if path.is_file() else None

    return sorted(name for name in names if content(left / name) != content(right / name))


def drill(
    model: Path, folder: Path, texts: int, kills: int, seed: int, prefix: str = ""
) -> dict[str, object]:
    """Run both ways and compare; returns what happened."""
    source, calm, killed = folder / "texts.jsonl", folder / "calm", folder / "killed"
    write_texts(source, texts, seed)
    subprocess.run(command(source, model, calm, prefix), check=True, stdout=subprocess.DEVNULL)
    draw = random.Random(seed)
    parts = -(-texts // SHARD_ROWS)
    targets = sorted(draw.randrange(0, 2 * parts) for _ in range(kills))
    seen: dict[str, int] = {}
    moments: list[int] = []
    rewritten: list[str] = []
    arguments = command(source, model, killed, prefix)

    def note_rewritten() -> None:
        now = finished_files(killed)
        rewritten.extend(name for name, written in now.items() if seen.get(name, written) != written)
        seen.update(now)

    for target in targets:
        alive, done = run_until(arguments, killed, target, draw.uniform(0, 0.3))
        note_rewritten()
        if alive:
            moments.append(done)
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    note_rewritten()
    return {
        "texts": texts,
        "shards": parts,
        "kills": len(moments),
        "files_at_kills": moments,
        "rewritten": rewritten,
        "different": differences(calm, killed),
    }


def main() -> None:
    """Command line of the drill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("minilm-l6"), help="a folder or a registry name")
    parser.add_argument(
        "--folder", type=Path, help="new folder for inputs and outputs; default: a temporary one"
    )
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", default="", help="put before every command, such as 'nice -n 10'")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="embedloom-drill-")) / "drill"
    folder.mkdir(parents=True)
    result = drill(
        arguments.model, folder, arguments.texts, arguments.kills, arguments.seed, arguments.prefix
    )
    print(json.dumps(result))
    sys.exit(bool(result["different"] or result["rewritten"]))


if __name__ == "__main__":
    main()
