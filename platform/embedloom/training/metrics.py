"""What a step leaves behind: a record, a line on the screen and in a file, a point in the trackers; and when to stop a run."""

import json
import math
import os
import resource
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from embedloom.config.rates import forward_flops
from embedloom.config.training import TrackerName
from embedloom.core.progress import Progress, note
from embedloom.core.storage import Place
from embedloom.training.dev import DevPoint

# Where a run can be watched: TensorBoard files by default, Weights & Biases and MLflow by config.
#
# ``metrics.jsonl`` is the record; a tracker that stops working is left behind with a line on the screen, since no
# server's trouble should end days of training. One that cannot even start is an error.


# Merging and other readers of model folders pass over names with _.
TENSORBOARD_FOLDER = "_tensorboard"
WANDB_FOLDER = "_wandb"
PROJECT = "embedloom"
_MLFLOW_TAG = "embedloom.run"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker calls a run."""

    label: str
    identity: str  # the same after a restart, so that the run goes on as one
    settings: Mapping[str, Any]  # JSON-like
    folder: Path | None  # of the model; None where the run's storage is no local folder
    first_step: int  # steps a killed run made behind its checkpoint come again


class Tracker(Protocol):
    """One place to send numbers to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of one step."""
        ...

    def close(self) -> None:
        """Send what is held back."""
        ...


class TensorBoardTracker:
    """Event files beside the metrics; needs a local folder."""

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        # Points of a killed run behind its checkpoint are hidden by purge_step.
        purge = run.first_step if run.first_step > 1 else None
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge, flush_secs=30)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run; ``WANDB_MODE=offline`` and its other variables apply."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        folder = None if run.folder is None else run.folder / WANDB_FOLDER
        if folder is not None:
            folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.label,
            id=run.identity,
            resume="allow",
            config=dict(run.settings),
            dir=None if folder is None else str(folder),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowTracker:
    """An MLflow run; ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` apply."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        if not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            mlflow.set_experiment(PROJECT)
        before = mlflow.search_runs(
            filter_string=f"tags.`{_MLFLOW_TAG}` = '{run.identity}'", output_format="list", max_results=1
        )
        if before:
            mlflow.start_run(run_id=before[0].info.run_id)
        else:
            mlflow.start_run(run_name=run.label, tags={_MLFLOW_TAG: run.identity})
            mlflow.log_params(dict(run.settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send one step."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def open_tracker(name: TrackerName, run: TrackedRun) -> Tracker | None:
    """The tracker of a name; None for TensorBoard below an object store, where it could not read its files."""
    if name == "tensorboard":
        return None if run.folder is None else TensorBoardTracker(run, run.folder)
    return WandbTracker(run) if name == "wandb" else MlflowTracker(run)


class Trackers:
    """All trackers of a run."""

    def __init__(self, names: Sequence[TrackerName], run: TrackedRun) -> None:
        opened = {name: open_tracker(name, run) for name in names}
        self._open = {name: tracker for name, tracker in opened.items() if tracker is not None}
        self._label = run.label

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Send the values that are known."""
        known = {name: value for name, value in values.items() if value is not None}
        self._each(lambda tracker: tracker.log(known, step))

    def close(self) -> None:
        """Send what is held back."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:  # their clients raise whatever their transport does
                del self._open[name]
                note(self._label, f"tracker {name} stopped working and is left out from here: {error}")


# Stopping a run that has gone wrong, with the names of the examples that were in the batch.


WINDOW_STEPS = 50
DIVERGED_FACTOR = 3.0


class LossWatch:
    """Says whether a loss is not a number, or has diverged.

    Diverged: the mean of the last 50 steps is 3 times the lowest mean of 50 steps so far, and above the mean of the
    first 50. The second condition leaves alone a loss so near 0 that its noise is a multiple of it.
    """

    def __init__(self, window_steps: int = WINDOW_STEPS, factor: float = DIVERGED_FACTOR) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=window_steps)
        self._first: float | None = None
        self._lowest = math.inf

    def problem(self, losses: Sequence[float], ids: Callable[[], Sequence[str]], step: int) -> str | None:
        """A sentence if training must stop, else None.

        Args:
            losses: of every query of the global batch.
            ids: of the same queries; asked for only where there is something to say.
            step: 1-based number of the step they belong to.
        """
        if not all(map(math.isfinite, losses)):
            bad = [name for name, loss in zip(ids(), losses, strict=True) if not math.isfinite(loss)]
            return (
                f"loss is not finite at step {step} for {len(bad)} of {len(losses)} queries: {', '.join(bad)}"
            )
        mean = self._window_mean(sum(losses) / len(losses))
        if mean is not None and self._has_diverged(mean):
            return (
                f"loss has diverged at step {step}: mean {mean:.4g} over {len(self._recent)} steps, "
                f"lowest so far {self._lowest:.4g}; the batch was {', '.join(ids())}"
            )
        self._remember(mean)
        return None

    def seen(self, loss: float) -> None:
        """A mean loss of a step before the checkpoint a run goes on from."""
        self._remember(self._window_mean(loss))

    def _has_diverged(self, mean: float) -> bool:
        return self._first is not None and mean > self._first and mean > self._factor * self._lowest

    def _window_mean(self, loss: float) -> float | None:
        self._recent.append(loss)
        is_full = len(self._recent) == self._recent.maxlen
        return sum(self._recent) / len(self._recent) if is_full else None

    def _remember(self, mean: float | None) -> None:
        if mean is not None:
            self._first = mean if self._first is None else self._first
            self._lowest = min(self._lowest, mean)


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
