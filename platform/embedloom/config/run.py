"""One run: the sections of ``jobs/configs/*.yaml``, in pipeline order."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig, apply_overrides, read_yaml, validate
from embedloom.config.data import CorpusConfig
from embedloom.config.gate import GateConfig
from embedloom.config.merging import MergingConfig
from embedloom.config.mining import MiningConfig
from embedloom.config.model import EncoderConfig
from embedloom.config.serving import ServingConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.config.training import TrainingConfig
from embedloom.config.training_options import check_not_judged
from embedloom.config.use import EmbeddingConfig, EvaluationConfig


class RunSection(FrozenConfig):
    """Identity of the run and where its artefacts go."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 42
    output_dir: str = "runs"  # a local path, s3://... or gs://...
    description: str = ""


class RunConfig(FrozenConfig):
    """A whole run; every section but ``run``, ``corpus``, ``encoder`` and ``training`` has defaults."""

    run: RunSection
    corpus: CorpusConfig
    synthesis: SynthesisConfig | None = None
    mining: MiningConfig
    encoder: EncoderConfig
    training: TrainingConfig
    merging: MergingConfig = MergingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    serving: ServingConfig = ServingConfig()

    @model_validator(mode="after")
    def _mix_has_its_sources(self) -> "RunConfig":
        runs = [self.training.of_run(run) for run in self.training.runs]
        mined = [(run, stage) for run in runs for stage in run.stages if stage.uses_mined]
        by_mix = [run for run, stage in mined if not stage.sources]
        if self.synthesis is None and any(run.mix.get("synthetic", 0.0) > 0 for run in by_mix):
            raise ValueError("training.mix.synthetic is above 0, but the config has no synthesis section")
        most = max((stage.negatives for _, stage in mined), default=0)
        if most > self.mining.selection.negatives:
            raise ValueError(
                f"training.stages use up to {most} negatives, but mining.selection.negatives keeps {self.mining.selection.negatives}"
            )
        models = ["merged", "base", *(run.name for run in self.training.runs)]
        for key, name in (("candidate", self.gate.candidate), ("against", self.gate.against)):
            if name not in models:
                raise ValueError(
                    f"gate.{key} is {name!r}, no model of this run; allowed: {', '.join(models)}"
                )
        return self

    @model_validator(mode="after")
    def _dev_tasks_are_not_judged(self) -> "RunConfig":
        if self.training.dev is not None:
            check_not_judged("training.dev.tasks", self.training.dev.tasks, self.evaluation.tasks)
        if self.merging.search is not None:
            check_not_judged("merging.search.tasks", self.merging.search.tasks, self.evaluation.tasks)
        return self

    @property
    def folder(self) -> str:
        """Root of this run's artefacts."""
        return f"{self.run.output_dir.rstrip('/')}/{self.run.name}"


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read, override and check a run config.

    Raises:
        ConfigError: naming the file, the key, the value seen and what is allowed.
    """
    content = apply_overrides(read_yaml(path), overrides or [])
    return validate(RunConfig, content, str(path))


StageName = Literal["corpus", "synthesize", "mine", "train", "merge", "evaluate", "gate", "embed", "serve"]
