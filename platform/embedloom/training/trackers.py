"""Where a run can be watched: TensorBoard files by default, Weights & Biases and MLflow by config.

``metrics.jsonl`` is the record; a tracker that stops working is left behind with a line on the screen, since no
server's trouble should end days of training. One that cannot even start is an error.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from embedloom.config.training_options import TrackerName
from embedloom.progress import note

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
