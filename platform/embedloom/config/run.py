"""One run: its config (the sections of ``jobs/configs/*.yaml`` in pipeline order), the run itself, which is a config on a
profile, the artefacts (nodes) that it consists of, and ``run.json`` in its folder.
"""

import difflib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig, apply_overrides, read_yaml, validate
from embedloom.config.cluster import ClusterConfig, Profile
from embedloom.config.corpus import CorpusConfig
from embedloom.config.embedding import EmbeddingConfig
from embedloom.config.encoder import EncoderConfig
from embedloom.config.evaluation import EvaluationConfig, GateConfig
from embedloom.config.merging import MergingConfig
from embedloom.config.mining import MiningConfig
from embedloom.config.rates import RatesConfig
from embedloom.config.reranker import RerankerConfig
from embedloom.config.serving import ServingConfig
from embedloom.config.synthesis import SynthesisConfig
from embedloom.config.training import MEAN_OF_TEACHERS, TrainingConfig, check_not_judged
from embedloom.core.artefacts import Artefact, ArtefactWriter, code_versions
from embedloom.core.contents import Contents
from embedloom.core.storage import Place
from embedloom.errors import DataError


class RunSection(FrozenConfig):
    """Identity of the run and where its artefacts go."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description=(
            "Name of the run: its artefacts lie in OUTPUT_DIR/NAME. Letters, digits, '.', '_' and '-'. "
            "Running a changed config under the same name rebuilds, and replaces, what depends on the "
            "change."
        ),
    )
    seed: int = Field(
        default=42,
        description=(
            "Seed of everything that is drawn: which documents are held out, which texts are shown to a "
            "generator, samples. Each training run has a seed of its own."
        ),
    )
    output_dir: str = Field(
        default="runs",
        description=(
            "Folder above the run's own: a local path, s3://... or gs://.... A relative path lies below "
            "the storage root of the cluster profile, if it has one."
        ),
    )
    description: str = Field(
        default="", description="Free text for people; shown in the report and changes nothing."
    )


class RunConfig(FrozenConfig):
    """A whole run; every section but ``run``, ``corpus``, ``encoder`` and ``training`` has defaults."""

    run: RunSection = Field(description="The run's name and seed, and the folder of its artefacts.")
    corpus: CorpusConfig = Field(
        description="Which documents are read, and how they are cleaned, deduplicated, cut and split."
    )
    synthesis: SynthesisConfig | None = Field(
        default=None,
        description="Queries and pairs written by LLMs. Null: the run trains on the pairs its sources hold.",
    )
    mining: MiningConfig = Field(
        description="Which teachers score candidates for every query, and which candidates become hard negatives."
    )
    encoder: EncoderConfig = Field(
        description="The pretrained model that is trained, its pooling and its prompts."
    )
    training: TrainingConfig = Field(
        description=(
            "Stages, sources, loss and optimiser of the contrastive training, and how many runs there are."
        )
    )
    reranker: RerankerConfig | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "A cross-encoder that is trained on the same mined examples and orders what the merged model found: trained, "
            "evaluated against no reranking, gated and served at /v1/rerank. Null: none."
        ),
    )
    merging: MergingConfig = Field(
        default=MergingConfig(), description="How the models of all training runs become one."
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(),
        description=(
            "Which tasks the base, the candidates and the merged model are scored on, and beside which "
            "baselines."
        ),
    )
    gate: GateConfig = Field(
        default=GateConfig(), description="What a model must show before it may be served."
    )
    embedding: EmbeddingConfig = Field(
        default=EmbeddingConfig(), description="How a corpus is embedded into stored vectors."
    )
    serving: ServingConfig = Field(
        default=ServingConfig(),
        description="What the endpoint serves, where it listens and what one request may ask for.",
    )

    @model_validator(mode="after")
    def _mix_has_its_sources(self) -> "RunConfig":
        runs = [self.training.of_run(run) for run in self.training.runs]
        mined = [(run, stage) for run in runs for stage in run.stages if stage.uses_mined]
        by_mix = [run for run, stage in mined if not stage.sources]
        if self.synthesis is None and any(run.mix.get("synthetic", 0.0) > 0 for run in by_mix):
            raise ValueError("training.mix.synthetic is above 0, but the config has no synthesis section")
        for run in by_mix:
            for name in (name for name, share in run.mix.items() if share > 0):
                self._check_dataset(f"training.mix.{name}", name)
        for _, stage in mined:
            for source in stage.sources:
                if source.format == "mined" and source.dataset is not None:
                    self._check_dataset(
                        f"training.stages.{stage.name}.sources.{source.name}.dataset", source.dataset
                    )
        for stage in self.training.stages:
            if (stage.max_document_tokens or 0) > self.encoder.max_document_tokens:
                raise ValueError(
                    f"training.stages.{stage.name}.max_document_tokens is {stage.max_document_tokens}, encoder.max_document_tokens "
                    f"{self.encoder.max_document_tokens}; allowed: up to what the encoder reads, or null"
                )
        most = max((stage.negatives for _, stage in mined), default=0)
        if most > self.mining.selection.negatives:
            raise ValueError(
                f"training.stages use up to {most} negatives, but mining.selection.negatives keeps {self.mining.selection.negatives}"
            )
        if self.gate.require_over_baseline is not None and not {*self.evaluation.baselines} - {"hybrid"}:
            seen = (
                "names hybrid alone, which the model is a part of"
                if self.evaluation.baselines
                else "is empty"
            )
            raise ValueError(
                f"gate.require_over_baseline is {self.gate.require_over_baseline!r}, but evaluation.baselines {seen}; "
                "allowed: null, or baselines among bm25 and teacher"
            )
        models = ["merged", "base", *(run.name for run in self.training.runs)]
        for key, name in (("candidate", self.gate.candidate), ("against", self.gate.against)):
            if name not in models:
                raise ValueError(
                    f"gate.{key} is {name!r}, no model of this run; allowed: {', '.join(models)}"
                )
        return self

    @model_validator(mode="after")
    def _reranker_fits(self) -> "RunConfig":
        section = self.reranker
        if section is None:
            return self
        training = section.training(self.training.mix)
        stage = training.stages[0]
        if not stage.uses_mined:
            return self
        if stage.negatives > self.mining.selection.negatives:
            raise ValueError(
                f"reranker.negatives is {stage.negatives}, but mining.selection.negatives keeps {self.mining.selection.negatives}"
            )
        if not stage.sources:
            for name in (name for name, share in training.mix.items() if share > 0):
                if name == "synthetic" and self.synthesis is None:
                    raise ValueError(
                        "reranker.mix.synthetic is above 0, but the config has no synthesis section"
                    )
                self._check_dataset(f"reranker.mix.{name}", name)
        for source in stage.sources:
            if source.format == "mined" and source.dataset is not None:
                self._check_dataset(f"reranker.sources.{source.name}.dataset", source.dataset)
        if training.distillation is not None:
            self._check_teacher(training.distillation.teacher, "reranker.distillation")
        return self

    def _check_dataset(self, key: str, name: str) -> None:
        """Raise ValueError if neither the corpus nor synthesis gives pairs of this name."""
        written = () if self.synthesis is None else self.synthesis.datasets
        known = tuple(dict.fromkeys((*self.corpus.datasets, *written)))
        if name in known:
            return
        if not known:
            raise ValueError(
                f"{key}: this run has no pairs at all; allowed: corpus.sources with query_column or query_from (or of format beir or "
                "python_docs), or a synthesis section"
            )
        near = difflib.get_close_matches(name, known, n=1)
        meant = f" (the nearest is {near[0]!r})" if near else ""
        raise ValueError(
            f"{key}: no pairs of this run are called {name!r}{meant}; allowed: {', '.join(known)}, by "
            "corpus.sources[].dataset and the synthesis section"
        )

    @model_validator(mode="after")
    def _distilled_scores_are_one_teachers(self) -> "RunConfig":
        for run in self.training.runs:
            own = self.training.of_run(run)
            if own.distillation is not None and any(stage.uses_mined for stage in own.stages):
                self._check_teacher(own.distillation.teacher)
        return self

    def _check_teacher(self, teacher: str | None, section: str = "training.distillation") -> None:
        """Raise ValueError if the mined examples have no scores of the teacher to distil, or several teachers' in one row."""
        mining = self.mining
        names = tuple(dict.fromkeys(one.model for one in mining.teachers))
        several = len(mining.teachers) > 1 and mining.rescoring is None
        if teacher is None and several and mining.selection.blend != "first":
            raise ValueError(
                f"{section}.teacher is null, but with mining.selection.blend: {mining.selection.blend} a query's scores "
                f"are of several teachers; allowed: {', '.join((*names, MEAN_OF_TEACHERS))}"
            )
        if teacher is not None and not several:
            whose = mining.rescoring.model if mining.rescoring is not None else names[0]
            raise ValueError(
                f"{section}.teacher is {teacher!r}, but the examples have the scores of {whose!r} alone; allowed: null"
            )
        if teacher is not None and teacher not in (*names, MEAN_OF_TEACHERS):
            raise ValueError(
                f"{section}.teacher is {teacher!r}; allowed: {', '.join((*names, MEAN_OF_TEACHERS))}"
            )

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


Inputs = dict[str, Artefact]
Build = Callable[["Run", Inputs, ArtefactWriter], Artefact]


@dataclass(frozen=True, slots=True)
class Run:
    """One run config on one profile."""

    config: RunConfig
    cluster: ClusterConfig
    profile_name: str
    rates: RatesConfig | None = None  # of the file beside the cluster config; None: there is none

    @property
    def profile(self) -> Profile:
        """What the machines offer."""
        return self.cluster.profile(self.profile_name)

    @property
    def place(self) -> Place:
        """Root of the run's artefacts."""
        return Place(self.profile.run_folder(self.config.folder))


@dataclass(frozen=True, slots=True)
class Node:
    """One artefact of the graph."""

    name: str  # its folder below the run
    verb: str  # the command that builds it
    settings: tuple[Any, ...]  # what of the config it depends on
    inputs: tuple[str, ...]
    build: Build
    # What the files it reads hold, by what the config calls them: settings have it as a hash.
    reads: Mapping[str, Contents] = field(default_factory=dict)
    # The models it opens that are no artefacts of the run, as the config names them.
    models: tuple[str, ...] = ()


# ``run.json`` in a run's folder: the config it was executed with, so that it can be explained, compared and replayed.


RUN_FILE = "run.json"
_VERSION = 1


def write_run_file(run: Run) -> None:
    """Keep the config as written (for replays) and with all defaults (for comparisons)."""
    run.place.write_json(
        RUN_FILE,
        {
            "version": _VERSION,
            "config": run.config.model_dump(mode="json", exclude_unset=True),
            "resolved": run.config.model_dump(mode="json"),
            "profile": run.profile_name,
            "versions": code_versions(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def read_run_file(place: Place) -> dict[str, Any]:
    """Content of ``run.json``.

    Raises:
        DataError: none there, or one that this version does not read.
    """
    if not place.exists(RUN_FILE):
        raise DataError(
            f"{place.uri}: no {RUN_FILE}, so its config is not known; `embedloom run CONFIG` writes it when it starts"
        )
    content = place.read_json(RUN_FILE)
    if content.get("version") != _VERSION or not isinstance(content.get("config"), dict):
        raise DataError(
            f"{place.uri}/{RUN_FILE}: version {content.get('version')!r}, this version reads {_VERSION}"
        )
    return content


def open_run(place: Place, cluster: ClusterConfig, profile: str | None, rates: RatesConfig | None) -> Run:
    """The run that was executed in a folder, to be executed or examined there again.

    Args:
        place: the run's folder; where it lies now counts, not where it was written.
        cluster: the machines.
        profile: a profile's name; None: the one it was executed on.
        rates: speeds and prices, if at hand.

    Raises:
        DataError: no ``run.json``.
        ConfigError: a config that this version does not read, or an unknown profile.
    """
    content = read_run_file(place)
    folder, _, name = place.uri.rstrip("/").rpartition("/")
    config = content["config"]
    section = {**config.get("run", {}), "output_dir": folder or ".", "name": name}
    run = Run(
        validate(RunConfig, {**config, "run": section}, f"{place.uri}/{RUN_FILE}"),
        cluster, profile or str(content["profile"]), rates,
    )  # fmt: skip
    cluster.profile(run.profile_name)
    return run
