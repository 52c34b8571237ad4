"""The kill drill: `embedloom embed` killed with -9 at random points of its work must end with identical files.

    python tests/drills/embed_kills.py [--model MODEL] [--texts 3000] [--kills 10] [--seed 0] [--folder FOLDER]

Embeds made-up texts once undisturbed and once with kills of the whole process group, each at a drawn number of
finished files (before the first, while embedding, while filling in) and a drawn fraction of a second later, then
compares every byte of the two folders. Also fails if a finished file was written twice.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from drills.comparing import differences
from drills.processes import run_until, written_at

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
    names = ("own", "vectors")
    return written_at(out, (path for name in names for path in (out / name).glob("part-*.parquet")))


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
        alive, done = run_until(arguments, lambda: finished_files(killed), target, draw.uniform(0, 0.3))
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
