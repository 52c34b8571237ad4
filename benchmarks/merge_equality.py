"""Whether our merging methods give what mergekit gives, tensor by tensor, on tiny models of two families.

    python benchmarks/merge_equality.py [--out docs/merging.md]

Each family has a base as it is usually published, with a head and the prefix that goes with it (LlamaForCausalLM:
``model.`` and ``lm_head``; BertForMaskedLM: ``bert.`` and ``cls``), and three models around it saved as backbones alone, as
embedding models are. ``embedloom merge-models`` reads them so. mergekit, in `.bench/mergekit` (see merge.py), wants one
class for all and gets the same backbones with the base's head. The numbers are the largest difference of an element and
the share of elements that differ by more than 1e-6 (float32).

DARE drops at random, each library by its own generator, and mergekit then matches the L1 norm where the paper, and we,
divide by the density: so only density 1, where nothing is dropped, can be compared. mergekit's slerp goes straight
between tensors of a cosine above 0.9995, ours down to 1e-6 rad; the models here are further apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")

import transformers  # noqa: E402
from merge import MERGEKIT, install_peer  # noqa: E402

from embedloom.pipeline.model_commands import merge_folders, merging_config  # noqa: E402
from fakes import byte_tokenizer  # noqa: E402

TOLERANCE, ALLOWED_SHARE = (
    1e-6,
    1e-4,
)  # TIES elects signs of sums near zero, where the order of a float32 sum decides
WEIGHTS = (0.5, 0.3, 0.2)
SIZES = dict(
    vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
FAMILIES = {
    "Llama": (
        "LlamaForCausalLM",
        "LlamaModel",
        "model.",
        {"num_key_value_heads": 2, "tie_word_embeddings": False},
    ),
    "Bert": ("BertForMaskedLM", "BertModel", "bert.", {}),
}
# Method: our settings, and mergekit's parameters of the whole merge where they are not its defaults.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"weights": WEIGHTS}, {"normalize": True}),
    "slerp": ({"weights": (0.7, 0.3)}, {"t": 0.3}),
    "multislerp": ({"weights": WEIGHTS}, {}),
    "karcher": ({}, {"max_iter": 100, "tol": 1e-7}),
    "task_arithmetic": ({"weights": WEIGHTS, "scale": 0.8}, {"normalize": False, "lambda": 0.8}),
    "ties": ({"weights": WEIGHTS, "density": 0.4}, {"normalize": True, "density": 0.4}),
    "dare_linear": ({"weights": WEIGHTS, "density": 1.0}, {"normalize": False, "density": 1.0}),
    "dare_ties": ({"weights": WEIGHTS, "density": 1.0}, {"normalize": True, "density": 1.0}),
    "model_stock": ({}, {}),
}
FROM_BASE = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock"}


def make_family(folder: Path, family: str) -> dict[str, list[Path]]:
    """The base and three backbones around it, as ours reads them and as mergekit does; the base first."""
    whole, alone, prefix, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **changes)
    headed = getattr(transformers, whole)(config)
    base = headed.state_dict()
    found: dict[str, list[Path]] = {"ours": [folder / "base"], "peer": [folder / "base"]}
    headed.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    if family == "Bert":  # published ones have a pooler, which mergekit asks for and the class leaves out
        size = config.hidden_size
        base |= {
            "bert.pooler.dense.weight": torch.randn(size, size),
            "bert.pooler.dense.bias": torch.randn(size),
        }
    # Nor does a trained bias consist of zeros, of which mergekit's multislerp says that they point nowhere.
    base = {n: t.clone().contiguous() if t.any() else 0.02 * torch.randn(t.shape) for n, t in base.items()}
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    for number in range(3):
        noise = torch.Generator().manual_seed(number + 1)
        moved = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
            for name, tensor in base.items()
            if name.startswith(prefix) and tensor.is_floating_point()
        }
        for side in found:
            out = folder / f"{side}-{number}"
            out.mkdir()
            kept = moved if side == "ours" else {**base, **moved}
            tensors = {
                n.removeprefix(prefix) if side == "ours" else n: t.clone().contiguous()
                for n, t in kept.items()
            }
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
            described = json.loads((folder / "base" / "config.json").read_text())
            kind = alone if side == "ours" else whole
            (out / "config.json").write_text(json.dumps({**described, "architectures": [kind]}))
            byte_tokenizer().save_pretrained(out)
            found[side].append(out)
    return found


def ours(method: str, folders: list[Path], out: Path) -> dict[str, torch.Tensor]:
    """The merged backbone by ``merge-models``."""
    base, *models = map(str, folders)
    given = {"method": method, **METHODS[method][0]}
    origin = base if method in FROM_BASE else None
    merge_folders(
        merging_config(given, []),
        models[:2] if method == "slerp" else models,
        origin,
        str(out),
        ROOT,
        None,
        False,
    )
    return load_file(out / "model.safetensors")


def peer_section(method: str, folders: list[Path]) -> dict[str, Any]:
    """mergekit's config of a merge."""
    base, *models = map(str, folders)
    section: dict[str, Any] = {"merge_method": method, "dtype": "float32", "parameters": METHODS[method][1]}
    weights = METHODS[method][0].get("weights")
    used = models[:2] if method == "slerp" else models
    section["models"] = [
        {"model": model, "parameters": {"weight": weights[n]} if weights and method != "slerp" else {}}
        for n, model in enumerate(used)
    ]
    if method == "slerp":
        section["base_model"] = used[0]
    elif method in FROM_BASE:
        section["base_model"] = base
    return section


def run_peer(root: Path, sections: dict[str, dict[str, Any]]) -> None:
    """Let mergekit make one folder a config, in one process of its own environment."""
    jobs = root / "jobs.json"
    jobs.write_text(json.dumps({str(root / name): section for name, section in sections.items()}))
    python = install_peer().with_name("python")
    subprocess.run(
        [str(python), "-c", _RUNNER, str(jobs)], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True
    )


_RUNNER = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for out, section in json.load(open(sys.argv[1])).items():
    run_merge(MergeConfiguration.model_validate(section), out, MergeOptions(quiet=True))
"""


def rows(root: Path) -> Iterator[tuple[str, str, float, float, int]]:
    """(family, method, largest difference, share of elements beyond the tolerance, elements)."""
    folders = {family: make_family(root / family, family) for family in FAMILIES}
    run_peer(root, {f"{f}-{m}": peer_section(m, folders[f]["peer"]) for f in FAMILIES for m in METHODS})
    for family, (_, _, prefix, _) in FAMILIES.items():
        for method in METHODS:
            left = ours(method, folders[family]["ours"], root / family / f"out-{method}")
            whole = {
                n: t
                for f in (root / f"{family}-{method}").glob("*.safetensors")
                for n, t in load_file(f).items()
            }
            right = {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}
            names = set(left) & set(right)
            odd = sorted(set(left) ^ set(right))
            if not names or any("pooler" not in name and "position_ids" not in name for name in odd):
                raise SystemExit(f"{family}, {method}: tensors on one side only: {odd[:5]}")
            gaps = torch.cat([(left[name] - right[name]).abs().flatten() for name in sorted(names)])
            yield family, method, float(gaps.max()), float((gaps > TOLERANCE).float().mean()), gaps.numel()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="write the page here instead of printing it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="embedloom-merge-") as folder:
        found = list(rows(Path(folder)))
    lines = ["| family | method | largest difference | beyond 1e-6 | elements |", "|---|---|---|---|---|"]
    lines += [f"| {f} | {m} | {gap:.1e} | {share:.1e} | {count:,} |" for f, m, gap, share, count in found]
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    text = f"# Merging beside mergekit\n\nMade on {date.today()} by `python benchmarks/merge_equality.py` with {MERGEKIT}.\n\n{about}\n\n"
    text += "\n".join(lines) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)
    unequal = [(f, m) for f, m, _, share, _ in found if share > ALLOWED_SHARE]
    if unequal:
        raise SystemExit(f"not equal: {unequal}")


if __name__ == "__main__":
    main()
