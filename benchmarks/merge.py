"""Merging six models beside mergekit: wall and peak memory of the whole process tree, linear and TIES.

    python benchmarks/merge.py [--quick] [--json] [--method linear|ties|both] [--folder FOLDER]

Work: six Llama-shaped models of 1.0 GB in float32 (142 MB with --quick), each a common base plus its own noise, made
on the fly; TIES reads the base too. Both sides are commands in processes of their own, `embedloom merge-models` and
`mergekit-yaml` (in `.bench/mergekit`, with the torch of this environment), import and start included, files in the page
cache. They take turns; the better of mergekit's two ways of writing counts. Memory is private (anonymous) memory, so
files that mergekit maps are not held against it; `work` has the resident figures too. The floor is the bytes read and
written at the rates measured here. The headline is the method with the smaller ratio.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
MERGEKIT = "mergekit==0.1.5"
PEER_FOLDER = ROOT / ".bench" / "mergekit"
MODELS = 6
DENSITY = 0.5
WEIGHTS = (0.3, 0.2, 0.2, 0.1, 0.1, 0.1)
LINEAR_TOLERANCE = 1e-6
# TIES elects signs of sums near zero, where the order of a float32 sum decides; such elements differ at will.
TIES_TOLERANCE, TIES_ELEMENTS = 1e-6, 1e-5
_PIECE = 2**20


def install_peer() -> Path:
    """mergekit in an environment of its own that finds everything else in this one's."""
    command = PEER_FOLDER / "bin" / "mergekit-yaml"
    if not command.is_file():
        venv.create(PEER_FOLDER, with_pip=True)
        python = str(PEER_FOLDER / "bin" / "python")
        packages = [MERGEKIT, "immutables>=0.21", "peft>=0.18"]
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", *packages], check=True, stdout=sys.stderr
        )
        own = next((PEER_FOLDER / "lib").glob("python*/site-packages"))
        (own / "lock.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return command


def shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            found[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name, shape in (("gate", (4, 1)), ("up", (4, 1)), ("down", (1, 4))):
            found[f"{prefix}mlp.{name}_proj.weight"] = (hidden * shape[0], hidden * shape[1])
        found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**found, "model.norm.weight": (hidden,)}


def make_models(root: Path, hidden: int, layers: int) -> list[Path]:
    """The base and six models around it; returns their folders, the base first."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": 32000,
        "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "tie_word_embeddings": True, "dtype": "float32", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }  # fmt: skip
    folders = [root / name for name in ("base", *(f"model{number}" for number in range(MODELS)))]
    generator = torch.Generator().manual_seed(0)
    base = {
        name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes(hidden, layers).items()
    }
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {
            name: value + 0.002 * torch.randn(value.shape, generator=generator) if number else value
            for name, value in base.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    os.sync()
    return folders


class Watched:
    """A command, its seconds and the peak memory of its process tree in MB: private and resident."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.private = self.resident = 0.0
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=self._watch, args=(psutil.Process(process.pid), process))
        watcher.start()
        output, _ = process.communicate()
        self.seconds = time.perf_counter() - started
        watcher.join()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{output.decode()[-3000:]}")

    def _watch(self, root: psutil.Process, process: "subprocess.Popen[bytes]") -> None:
        while process.poll() is None:
            resident = private = 0
            try:
                for member in (root, *root.children(recursive=True)):
                    memory = member.memory_info()
                    resident += memory.rss
                    private += memory.rss - memory.shared
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            self.private, self.resident = max(self.private, private / 1e6), max(self.resident, resident / 1e6)
            time.sleep(0.005)


def environment(**values: str) -> dict[str, str]:
    """The caller's, without limits on threads: both sides may use all cores."""
    return {k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")} | values


def run_ours(method: str, folders: list[Path], out: Path) -> Watched:
    shutil.rmtree(out, ignore_errors=True)
    base, *models = map(str, folders)
    command = [
        sys.executable,
        "-m",
        "embedloom.cli",
        "merge-models",
        *models,
        "--out",
        str(out),
        "--method",
        method,
    ]
    command += ["--weights", ",".join(map(str, WEIGHTS))]
    if method == "ties":
        command += ["--base", base, "--density", str(DENSITY)]
    return Watched(command, environment(PYTHONPATH=str(ROOT / "platform")))


def run_peer(command: Path, method: str, folders: list[Path], out: Path, extra: list[str]) -> Watched:
    shutil.rmtree(out, ignore_errors=True)
    base, *models = map(str, folders)
    section: dict[str, Any] = {
        "merge_method": method, "dtype": "float32", "parameters": {"normalize": True},
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, WEIGHTS, strict=True)],
    }  # fmt: skip
    if method == "ties":
        section["base_model"] = base
        section["parameters"]["density"] = DENSITY
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(section))
    return Watched([str(command), str(file), str(out), "--quiet", *extra], environment(HF_HUB_OFFLINE="1"))


def compare(method: str, ours: Path, peer: Path) -> dict[str, Any]:
    """Largest difference, and how many elements differ by more than the tolerance."""
    largest, beyond, elements = 0.0, 0, 0
    tolerance = LINEAR_TOLERANCE if method == "linear" else TIES_TOLERANCE
    files = {
        side: {n: f for f in folder.glob("*.safetensors") for n in safe_open(f, "pt").keys()}  # noqa: SIM118
        for side, folder in (("ours", ours), ("peer", peer))
    }
    if set(files["ours"]) != set(files["peer"]):
        return {"equal": False, "tensors_differ": sorted(set(files["ours"]) ^ set(files["peer"]))[:5]}
    for name in files["ours"]:
        left, right = (safe_open(files[side][name], "pt").get_tensor(name) for side in ("ours", "peer"))
        difference = (left - right).abs()
        largest = max(largest, float(difference.max()))
        beyond += int((difference > tolerance).sum())
        elements += difference.numel()
    allowed = 0 if method == "linear" else int(TIES_ELEMENTS * elements)
    return {
        "equal": beyond <= allowed, "largest_difference": largest, "beyond_tolerance": beyond, "elements": elements,
        "tolerance": tolerance, "allowed_beyond": allowed,
    }  # fmt: skip


def rates(source: Path, target: Path) -> tuple[float, float]:
    """Bytes a second read from the page cache, and written with their sync, by as many threads as cores."""
    os.sync()  # or the disk is still busy with what the merges wrote
    size, threads = source.stat().st_size, os.cpu_count() or 1
    offsets = range(0, size - _PIECE, _PIECE)

    def timed(work: Any, finish: Any = lambda: None) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, offsets))
        finish()
        return len(offsets) * _PIECE / (time.perf_counter() - started)

    local = threading.local()

    def read(offset: int) -> None:
        if not hasattr(local, "piece"):
            local.piece = bytearray(_PIECE)
        os.preadv(reading, [local.piece], offset)

    piece = os.urandom(_PIECE)
    reading, writing = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        timed(read)
        reads = timed(read)
        return reads, timed(lambda offset: os.pwrite(writing, piece, offset), lambda: os.fsync(writing))
    finally:
        os.close(reading)
        os.close(writing)
        target.unlink()


def measure(method: str, folders: list[Path], root: Path, command: Path, repeats: int) -> dict[str, Any]:
    """Both sides in turns; medians of the seconds, largest memory of ours, smallest of the peer's."""
    ours, peers = [], []
    for turn in range(repeats):
        ours.append(run_ours(method, folders, root / "ours"))
        extra = [[], ["--async-write"]][turn % 2]
        peers.append(run_peer(command, method, folders, root / "peer", extra))
    merging = json.loads((root / "ours" / "manifest.json").read_text())["seconds"]
    seconds = sorted(run.seconds for run in ours)[len(ours) // 2]
    best = min(run.seconds for run in peers)
    size = (folders[0] / "model.safetensors").stat().st_size
    # TIES needs each threshold before it can elect: models and base are read three times.
    reads, writes = (MODELS * size if method == "linear" else 3 * (MODELS + 1) * size), size
    read_rate, write_rate = rates(folders[1] / "model.safetensors", root / "rate")
    floor = reads / read_rate + writes / write_rate
    return {
        "ours": round(seconds, 2), "peer": round(best, 2), "ratio": round(best / seconds, 2),
        "peak_mb": round(max(run.private for run in ours)), "peer_peak_mb": round(min(run.private for run in peers)),
        "resident_mb": round(max(run.resident for run in ours)),
        "peer_resident_mb": round(min(run.resident for run in peers)),
        "floor_seconds": round(floor, 2), "floor_share": round(floor / seconds, 3),
        "seconds_without_start": merging, "floor_share_without_start": round(floor / merging, 3),
        "read_gb_per_second": round(read_rate / 1e9, 1), "write_gb_per_second": round(write_rate / 1e9, 1),
        "all_seconds": {"ours": [round(r.seconds, 2) for r in ours], "peer": [round(r.seconds, 2) for r in peers]},
        **compare(method, root / "ours", root / "peer"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="models of 142 MB, one turn")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--folder", type=Path, help="for the models, some 11 GB; default: a temporary folder")
    parser.add_argument("--method", choices=("linear", "ties", "both"), default="both")
    options = parser.parse_args()

    command = install_peer()
    with tempfile.TemporaryDirectory(prefix="el-merge-", dir=options.folder) as temporary:
        root = Path(temporary)
        hidden, layers = (256, 26) if options.quick else (1024, 13)
        folders = make_models(root, hidden, layers)
        size = (folders[0] / "model.safetensors").stat().st_size
        turns = {"linear": 1 if options.quick else 4, "ties": 1}
        methods = list(turns) if options.method == "both" else [options.method]
        found = {method: measure(method, folders, root, command, turns[method]) for method in methods}
    name = min(found, key=lambda method: found[method]["ratio"])
    keys = ("ours", "peer", "ratio", "floor_share", "peak_mb", "peer_peak_mb")
    result = {
        "name": "merge", "peer_name": f"mergekit-yaml ({MERGEKIT}), {name}", "unit": "seconds",
        **{key: found[name][key] for key in keys}, "equal": all(found[method]["equal"] for method in found),
        "work": {
            "models": MODELS, "model_mb": round(size / 1e6), "dtype": "float32", "cores": os.cpu_count(),
            "density": DENSITY, "by_method": found,
        },
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
