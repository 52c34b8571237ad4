"""A finished quickstart of a decoder as it left its manifests on a busy machine on 2026-11-25, without its rows."""

from pathlib import Path

from embedloom.config.run import Run
from embedloom.core.artefacts import Artefact
from embedloom.pipeline.commands import load
from embedloom.pipeline.graph import graph, writer_for

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart_llama.yaml"
CLUSTER = ROOT / "cluster" / "cluster.yaml"

# artefact -> seconds and counts
MEASURED = {
    "corpus": (9.0, {"read": 3890, "rows": 3603, "pairs": 3335, "pairs_by_split": {"train": 2915}}),
    "encoder": (2.0, {"parameters": 31852224}),
    "synthesis": (156.0, {"rows": 80, "output_tokens": 2735, "tokens": 12682}),
    "mining": (111.0, {"rows": 2995, "tokens": 238670}),
    "examples": (50.0, {"rows": 2486}),
    "training/alpha/pretrain": (284.0, {"rows": 4800, "steps": 600, "tokens": 591738, "step_seconds": 236.5}),
    "training/alpha/finetune": (
        266.0,
        {"rows": 3840, "steps": 480, "tokens": 1010701, "step_seconds": 231.6},
    ),
    "training/beta/pretrain": (237.0, {"rows": 4800, "steps": 600, "tokens": 592023, "step_seconds": 199.7}),
    "training/beta/finetune": (295.0, {"rows": 3840, "steps": 480, "tokens": 1011068, "step_seconds": 253.3}),
    "merged": (1.0, {"parameters": 31852224}),
    "evaluation": (41.0, {"rows": 271, "scores": 6, "tokens": 148823}),
    "gate": (1.0, {"rows": 1}),
    "vectors": (32.0, {"rows": 3603, "tokens": 168510}),
}


def quickstart(folder: Path, *overrides: str) -> Run:
    """The shipped quickstart of a decoder on the shipped cluster config, with its artefacts in ``folder``."""
    return load(QUICKSTART, "local", CLUSTER, ["run.name=quickstart", f"run.output_dir={folder}", *overrides])


def finish(run: Run) -> dict[str, Artefact]:
    """Commit every artefact with the measured seconds and counts."""
    nodes = graph(run)
    done: dict[str, Artefact] = {}
    for name, node in nodes.items():
        seconds, counts = MEASURED[name]
        inputs = {parent: done[parent].fingerprint for parent in node.inputs}
        done[name] = writer_for(run, nodes, name, inputs).commit(counts, seconds=seconds)
    return done
