"""What a step leaves behind: one record, one line on the screen, one line in a file, a point in TensorBoard."""

import json
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from embedloom.config.rates import forward_flops
from embedloom.config.training_options import TrackerName
from embedloom.progress import Progress, note
from embedloom.storage import Place
from embedloom.training.dev import DevPoint
from embedloom.training.trackers import TrackedRun, Trackers

METRICS_FILE = "metrics.jsonl"

# Dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; longer names first.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of ``metrics.jsonl``."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    queries: int
    tokens: int  # real ones, of all workers
    padding_share: float
    imbalance: float
    seconds: float
    memory_mib: int  # most that rank 0 held at once so far
    mfu: float | None = None  # of all workers; None where the device's peak is not known
    dev_score: float | None = None  # mean over dev tasks; None at steps that are not scored

    @property
    def shown(self) -> dict[str, Any]:
        """The values of the progress line."""
        values: dict[str, Any] = {
            "loss": self.loss,
            "lr": self.learning_rate,
            "grad_norm": self.grad_norm,
            "queries/s": round(self.queries / self.seconds, 1),
            "tokens/s": round(self.tokens / self.seconds),
            "padding": f"{self.padding_share:.1%}",
            "waiting": f"{self.imbalance:.1%}",
        }
        if self.mfu is not None:
            values["mfu"] = f"{self.mfu:.1%}"
        if self.dev_score is not None:
            values["dev"] = self.dev_score
        return {**values, "memory": f"{self.memory_mib:,} MiB"}


class StepWriter:
    """Rank 0's record of the run so far; a resumed run takes over the records up to its checkpoint."""

    def __init__(
        self,
        label: str,
        total_steps: int,
        folder: Place | None,
        trackers: Sequence[TrackerName] = ("tensorboard",),
        identity: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Write nothing yet.

        Args:
            label: of the stage, for people.
            total_steps: of the stage.
            folder: for ``metrics.jsonl`` and trackers' files, where it is local.
            trackers: where else to send the numbers.
            identity: by which trackers know the run again after a restart.
            settings: of the run, for trackers to show.
        """
        self.records: list[StepRecord] = []
        self._label = label
        self._total = total_steps
        self._folder = folder if folder is not None and folder.is_local else None
        self._names, self._identity, self._settings = trackers, identity, settings or {}
        self._progress: Progress | None = None
        self._trackers: Trackers | None = None

    def start(self, records: list[StepRecord]) -> None:
        """Begin, or go on, after these records: what later steps of a killed run wrote is cut off."""
        self.records = list(records)
        done = len(records)
        # A line a step, but of steps shorter than a second not every one; the file has them all.
        self._progress = Progress(self._label, self._total, "steps", done=done, every_seconds=1.0)
        folder = None
        if self._folder is not None:
            self._folder.write_bytes(METRICS_FILE, metrics_text(records).encode())
            folder = self._folder.local
        run = TrackedRun(self._label, self._identity, self._settings, folder, done + 1)
        self._trackers = Trackers(self._names, run)

    def add(self, record: StepRecord) -> None:
        """Keep and show one step."""
        self.records.append(record)
        if self._progress is not None:
            self._progress.advance(1, **record.shown)
        if self._folder is not None:
            with (self._folder.local / METRICS_FILE).open("a") as stream:
                stream.write(json.dumps(asdict(record)) + "\n")
        if self._trackers is not None:
            values = {f"train/{name}": value for name, value in asdict(record).items() if name != "step"}
            self._trackers.log(values, record.step)

    def add_dev(self, point: DevPoint, metric: str, is_best: bool) -> None:
        """Show the dev scores of a step; before its record, as trackers want steps in order."""
        best = ", the best so far: its weights are kept" if is_best else ""
        note(self._label, f"dev {metric} {point.score:.5f} after {point.step} steps{best}")
        if self._trackers is not None:
            values = {f"dev/{name}/{metric}": score for name, score in point.tasks.items()}
            self._trackers.log({**values, f"dev/{metric}": point.score}, point.step)

    def close(self) -> None:
        """Send what trackers hold back."""
        if self._trackers is not None:
            self._trackers.close()


def metrics_text(records: list[StepRecord]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(asdict(record)) + "\n" for record in records)


def read_metrics(folder: Path) -> list[StepRecord]:
    """Records of a checkpoint folder; none if it holds none."""
    path = folder / METRICS_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    return [StepRecord(**json.loads(line)) for line in lines]


def peak_memory_mib(device: torch.device) -> int:
    """Most memory this process held at once: of its GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) / 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s the device could do in bfloat16, or None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def training_flops(
    tokens: float, squared_tokens: float, weights: int, layers: int, hidden_size: int, frozen: int = 0
) -> float:
    """FLOPs of a forward and backward: those of three forwards, but 4 instead of 6 of a frozen weight, which has no gradient.

    Recomputation (gradient checkpointing, cached gradients) is not counted: MFU is about useful work.

    Args:
        tokens: real tokens.
        squared_tokens: sum of n² over texts.
        weights: of the matrices that every token goes through, so without the token embeddings.
        layers: of the backbone.
        hidden_size: of the backbone.
        frozen: how many of the weights are frozen.
    """
    return 3 * forward_flops(weights, layers, hidden_size, tokens, squared_tokens) - 2 * frozen * tokens
