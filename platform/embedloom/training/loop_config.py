"""What a training worker is told."""

from dataclasses import dataclass
from pathlib import Path

from embedloom.artefacts import fingerprint
from embedloom.config.training import WATCHING, TrainingConfig, TrainingStage
from embedloom.config.training_data import TrainingSource
from embedloom.encoder.device import DTypeName
from embedloom.instructions import PromptContract
from embedloom.storage import Place
from embedloom.training.dev import DevTasks


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Everything a worker needs; picklable."""

    label: str
    training: TrainingConfig
    stage: TrainingStage
    sources: tuple[TrainingSource, ...]
    seed: int
    learning_rate_scale: float
    dtype: DTypeName
    start_model: Path
    data: Place  # prepared sources
    folders: dict[str, str]  # of each source, below data
    logs: Place
    threads: int
    bf16_weights: bool | None = None  # as TrainingGroup has it
    gradient_dtype: str = "float32"
    dev_tasks: DevTasks | None = None  # of training.dev
    contract: PromptContract | None = None  # of the model that comes out; None: as of the one it starts from

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must have been made with to go on from it."""
        varying = {"runs", "stages", "checkpoint_every_steps", *WATCHING}
        training = self.training.model_dump(mode="json", exclude=varying)
        return fingerprint(training, self.stage, self.sources, self.seed, self.learning_rate_scale)

    @property
    def identity(self) -> str:
        """By which trackers know the run: another one for each place that it is trained in."""
        return fingerprint(self.fingerprint, self.logs.uri)

    @property
    def settings(self) -> dict[str, str]:
        """What trackers show of the run."""
        training = self.training.model_dump(mode="json", exclude={"runs", "stages"}, exclude_none=True)
        stage = self.stage.model_dump(mode="json", exclude={"sources"}, exclude_none=True)
        scale = {"seed": self.seed, "learning_rate_scale": self.learning_rate_scale}
        return {key: str(value) for key, value in {**training, **stage, **scale}.items()}
