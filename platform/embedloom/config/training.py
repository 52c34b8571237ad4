"""Section ``training``: stages, candidates, losses, the sources of the mix, and parts that are off or small by default."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.evaluation import EvaluationTask
from embedloom.core.schemas import ORIGINS, TASK_TYPES

# The sources of a training mix.


TrainingFormat = Literal[
    "mined", "examples", "embed_nemotron", "nemo_json", "sentence_transformers", "flagembedding", "beir"
]


class TrainingSource(FrozenConfig):
    """One source of a training mix."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the source in metrics, data card and prompts.",
    )
    format: TrainingFormat = Field(
        description=(
            "mined: the run's own mined examples. examples: those of another run (its examples folder). "
            "embed_nemotron: a subset of nvidia/embed-nemotron-dataset-v1. nemo_json: a NeMo AutoModel "
            "training file with its corpus folders. sentence_transformers: Parquet or JSON lines with "
            "anchor, positive, negative or negative_1 ... n. flagembedding: JSON lines with query, pos, "
            "neg. beir: a folder, its train judgements."
        )
    )
    path: str | None = Field(
        default=None, description="Folder or file in that format. Null: only for format mined."
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Share of the mix, relative to the other sources'. All sources of a stage have a weight, or "
            "none has. Null: all rows count, or cap of them."
        ),
    )
    cap: int | None = Field(
        default=None, ge=1, description="Most rows used, drawn once by the seed. Null: all."
    )
    instruction: str | None = Field(
        default=None,
        description="Instruction of the queries. Null: the data's own, else that of the task type.",
    )
    task_type: str = Field(
        default="retrieval",
        description=(
            "Task type of the rows, where the format states none; decides the default instruction and "
            "whether both sides get it."
        ),
    )
    negatives: int | None = Field(
        default=None, ge=0, description="Most negatives used of a query's own. Null: the stage's number."
    )
    license: str | None = Field(
        default=None,
        description="Licence as the source states it, for the data card. Null: the card says that none is stated.",
    )
    dataset: str | None = Field(
        default=None,
        description=(
            "mined, examples: only rows of this dataset, as corpus.sources[].dataset names it ('public' "
            "where it names none, 'synthetic' for written rows). Null: all."
        ),
    )
    query_column: str = Field(default="anchor", description="sentence_transformers: column of the query.")
    positive_column: str = Field(
        default="positive", description="sentence_transformers: column of the right answer."
    )
    local_texts: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "embed_nemotron: original repository -> local folder or file with its texts, where a subset "
            "ships ids only."
        ),
    )

    @field_validator("task_type")
    @classmethod
    def _known_task_type(cls, value: str) -> str:
        if value not in TASK_TYPES:
            raise ValueError(f"unknown task_type {value!r}; allowed: {list(TASK_TYPES)}")
        return value

    @model_validator(mode="after")
    def _has_its_place(self) -> "TrainingSource":
        if (self.path is None) != (self.format == "mined"):
            needs = "takes no path" if self.format == "mined" else "needs a path"
            raise ValueError(f"source {self.name!r}: format {self.format} {needs}")
        if self.weight is not None and self.cap is not None:
            raise ValueError(f"source {self.name!r} has a weight and a cap; allowed: one of them")
        return self


class SourceChanges(FrozenConfig):
    """What one run changes of a source."""

    weight: float | None = Field(
        default=None, gt=0, description="Share of the mix in this run. Null: as in the stage."
    )
    cap: int | None = Field(
        default=None, ge=1, description="Most rows used in this run. Null: as in the stage."
    )
    negatives: int | None = Field(
        default=None, ge=0, description="Most negatives of a query in this run. Null: as in the stage."
    )
    drop: bool = Field(default=False, description="Whether this run leaves the source out.")


def changed_sources(
    sources: tuple[TrainingSource, ...], changes: dict[str, SourceChanges], stage: str
) -> tuple[TrainingSource, ...]:
    """The sources of a stage with a run's changes.

    Raises:
        ValueError: a source that the stage does not have, none left, or sources that do not fit together.
    """
    names = [source.name for source in sources]
    if unknown := sorted(set(changes) - set(names)):
        allowed = ", ".join(names) or "none, the stage has the run's mined examples by mix"
        raise ValueError(
            f"stages.{stage}.sources: {unknown[0]!r} is no source of the stage; allowed: {allowed}"
        )
    kept = []
    for source in sources:
        change = changes.get(source.name, SourceChanges())
        if change.drop:
            continue
        values = change.model_dump(exclude_none=True, exclude={"drop"})
        if ("weight" in values and source.cap is not None) or ("cap" in values and source.weight is not None):
            raise ValueError(
                f"stages.{stage}.sources.{source.name}: a weight in place of a cap, or the other way; allowed: the kind it has"
            )
        kept.append(source.model_copy(update=values))
    if sources and not kept:
        raise ValueError(f"stages.{stage}.sources: all are dropped; allowed: one or more left")
    return check_sources(tuple(kept))


def check_sources(sources: tuple[TrainingSource, ...]) -> tuple[TrainingSource, ...]:
    """Different names, and weights on all or on none."""
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"sources must have different names, found {names}")
    weighted = [source.name for source in sources if source.weight is not None]
    if weighted and len(weighted) != len(sources):
        plain = next(source.name for source in sources if source.weight is None)
        raise ValueError(
            f"source {weighted[0]!r} has a weight and {plain!r} none; allowed: weights on all sources, or caps"
        )
    return sources


# Parts of the training section that are off, or small, by default: dev scores, adapters, trackers, parity.


TrackerName = Literal["tensorboard", "wandb", "mlflow"]
ParityReader = Literal["embedloom", "transformers", "sentence-transformers", "vllm"]
# Those that need nothing but what training itself needs; vllm starts an engine, half a minute on a CPU.
PARITY_READERS: tuple[ParityReader, ...] = ("embedloom", "transformers", "sentence-transformers")


class DevScoring(FrozenConfig):
    """Scores on development tasks while a stage trains, by the same code that evaluates the finished models."""

    tasks: tuple[EvaluationTask, ...] = Field(
        default=(EvaluationTask(name="dev", split="dev"),),
        description=(
            "Development tasks, written as in evaluation.tasks; each must rank documents and be no task "
            "that the run is judged on."
        ),
    )
    every_steps: int = Field(
        default=200,
        ge=1,
        description=(
            "Optimiser steps between two scorings; the model is also scored before the first step and "
            "after the last."
        ),
    )
    metric: Literal["ndcg_at_10", "mrr_at_10", "recall_at_10", "recall_at_100"] = Field(
        default="ndcg_at_10", description="Score that is watched, mean over the tasks."
    )
    keep: Literal["best", "last"] = Field(
        default="best", description="Which weights the stage hands on: those of the best score, or the last."
    )

    @field_validator("tasks")
    @classmethod
    def _tasks_are_for_development(cls, value: tuple[EvaluationTask, ...]) -> tuple[EvaluationTask, ...]:
        names = [task.name for task in value]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must be a non-empty list of different names, found {names}")
        for task in value:
            if task.kind not in ("mteb", "benchmark") and task.split != "dev":
                raise ValueError(
                    f"task {task.name!r} is of split {task.split}, which is for the final score; allowed: split dev"
                )
        return value

    @property
    def needs_corpus(self) -> bool:
        """Whether a task is the run's own held-out split."""
        return any(task.kind == "heldout" for task in self.tasks)


def check_not_judged(key: str, tasks: tuple[EvaluationTask, ...], judged: tuple[EvaluationTask, ...]) -> None:
    """Refuse a dev task whose very texts the run is judged on: weights chosen by it would be tuned to the test.

    Raises:
        ValueError: naming the task.
    """
    for task in tasks:
        for other in judged:
            if _texts_of(task) == _texts_of(other):
                raise ValueError(
                    f"{key}: {task.name!r} is what evaluation.tasks scores as {other.name!r}; "
                    "choosing weights by it would tune them to the test; allowed: tasks or splits that are not evaluated"
                )


def _texts_of(task: EvaluationTask) -> tuple[str | None, ...]:
    """What decides a task's queries; mteb's tasks are known by name, others by their place."""
    if task.kind in ("mteb", "benchmark"):
        return ("mteb", task.name)
    path = None if task.path is None else task.path.rstrip("/")
    return (task.kind, path, task.split)


class LoraConfig(FrozenConfig):
    """Low-rank adapters instead of all weights (arXiv 2106.09685); the exported model is base + alpha / rank x B A."""

    rank: int = Field(default=16, ge=1, description="Rank of the adapters: their inner dimension.")
    alpha: float = Field(
        default=32.0, gt=0, description="Scale of the adapters: base + alpha / rank x B A is exported."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the adapters' inputs set to 0 while training."
    )
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description=(
            "Last parts of the names of linear layers that get adapters, such as q_proj. Null: every "
            "linear layer."
        ),
    )

    @model_validator(mode="after")
    def _some_target(self) -> "LoraConfig":
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora.target_modules is empty; allowed: names of linear layers, or null for all")
        return self


def check_different(names: tuple[str, ...], label: str) -> tuple[str, ...]:
    """The names, if no two are the same.

    Raises:
        ValueError: two are.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"{label} must be different, found {list(names)}")
    return names


LossName = Literal["infonce", "gecko", "qwen3", "gemini"]
Schedule = Literal["linear", "cosine", "constant"]
# How a run is watched, checked and restarted decides nothing about the weights, so no fingerprint counts it.
WATCHING = frozenset({"max_failures", "checkpoints_kept", "trackers", "parity"})


# What fits the memory of a worker. It decides rounding and nothing else, so it may change while a stage is trained,
# and no finished one is stale by it.
ROUNDING = frozenset({"micro_batch_tokens", "zero_stage", "gradient_checkpointing"})

# false, true, or every how many layers; 1 reads as true.
Recomputation = bool | Annotated[int, Field(ge=2)]


class TrainingStage(FrozenConfig):
    """One contrastive stage (arXiv 2511.07025 Table 8)."""

    name: str = Field(
        pattern=r"^[a-z0-9_]+$",
        description="Name of the stage: the folder below training/RUN/, and the key of runs[].stages.",
    )
    negatives: int = Field(
        ge=0,
        description=(
            "Mined negatives per query, at most mining.selection.negatives. The recipe has 1, then 4 "
            "(arXiv 2511.07025 Table 8). 0 only for losses that compare with the rest of the batch."
        ),
    )
    global_batch: int = Field(ge=1, description="Queries per optimiser step, over all workers.")
    learning_rate: float = Field(
        gt=0, description="Highest learning rate, reached after warm-up; runs may scale it."
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimiser steps of the stage. Null: as many as `epochs` passes over the mix need.",
    )
    epochs: float = Field(
        default=1.0, gt=0, description="Passes over the mix, where max_steps is null; fractions are allowed."
    )
    warmup_steps: int = Field(
        default=100,
        ge=0,
        description=(
            "Steps over which the learning rate rises from 0; 100 in the recipe (Table 8). Keep it well "
            "below the number of steps."
        ),
    )
    schedule: Schedule = Field(
        default="linear",
        description="After warm-up: linear (the recipe's) or cosine decay to 0 at the last step, or constant.",
    )
    sources: tuple[TrainingSource, ...] = Field(
        default=(),
        description=(
            "What the stage trains on. Empty: the run's own mined examples, in the shares of training.mix."
        ),
    )
    max_document_tokens: int | None = Field(
        default=None,
        ge=8,
        exclude_if=lambda value: value is None,
        description=(
            "Tokens of a document that this stage reads, at most encoder.max_document_tokens. Shorter is cheaper in "
            "proportion, and a model trained on the beginnings of documents still reads all that the encoder allows when "
            "it is served. Null: as encoder.max_document_tokens."
        ),
    )
    gradient_checkpointing: Recomputation | None = Field(
        default=None,
        description=(
            "Recomputation in this stage: false, true, or every how many layers. A stage with fewer negatives or a "
            "smaller batch has fewer tokens a worker and may do with less. Null: as training.gradient_checkpointing."
        ),
    )

    @field_validator("sources")
    @classmethod
    def _sources_fit_together(cls, value: tuple[TrainingSource, ...]) -> tuple[TrainingSource, ...]:
        return check_sources(value)

    @property
    def uses_mined(self) -> bool:
        """Whether the run's own mined examples are among what this stage trains on."""
        return not self.sources or any(source.format == "mined" for source in self.sources)


class StageChanges(FrozenConfig):
    """What one run changes in a stage."""

    negatives: int | None = Field(
        default=None, ge=0, description="Negatives per query in this run. Null: as in the stage."
    )
    global_batch: int | None = Field(
        default=None, ge=1, description="Queries per optimiser step in this run. Null: as in the stage."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Highest learning rate in this run. Null: as in the stage."
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps in this run. Null: as in the stage."
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Passes over the mix in this run; given alone, it replaces the stage's max_steps. Null: as in "
            "the stage."
        ),
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Warm-up steps in this run. Null: as in the stage."
    )
    schedule: Schedule | None = Field(
        default=None, description="Course of the learning rate in this run. Null: as in the stage."
    )
    sources: dict[str, SourceChanges] = Field(
        default_factory=dict, description="Source name -> what this run has otherwise of it."
    )

    def of(self, stage: TrainingStage) -> TrainingStage:
        """The stage with the changes.

        Raises:
            ValueError: a source that the stage does not have, or sources that no longer fit together.
        """
        values = self.model_dump(exclude_none=True, exclude={"sources"})
        if "epochs" in values:
            values.setdefault("max_steps", None)
        values["sources"] = changed_sources(stage.sources, self.sources, stage.name)
        return stage.model_copy(update=values)


# Learning from a teacher's scores of each query's own documents.


DistillationLoss = Literal["kl", "margin_mse"]
MEAN_OF_TEACHERS = "mean"
# Formats whose rows may hold a teacher's scores of the positive and the negatives.
SCORED_FORMATS = frozenset({"mined", "examples", "sentence_transformers", "flagembedding"})


class SourceDistillation(FrozenConfig):
    """What one source has otherwise of the distillation."""

    weight: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the part for this source's rows; 0: off. Null: the section's.",
    )
    temperature: float | None = Field(
        default=None, gt=0, description="Temperature for this source's rows. Null: the section's."
    )
    teacher_temperature: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Temperature of the teacher's scores of this source's rows, whose teacher may be another. Null: as the "
            "section has it."
        ),
    )


class DistillationConfig(FrozenConfig):
    """A part of the loss that compares the model with a teacher, beside the contrastive loss.

    The teacher's scores are those that mining kept (the examples' ``positive_score`` and ``negative_scores``), or that a
    source's rows hold; no teacher runs.
    """

    loss: DistillationLoss = Field(
        default="kl",
        description=(
            "kl: Kullback-Leibler divergence of the teacher's softmax over a query's own documents from the model's. "
            "margin_mse: squared difference of the two margins between positive and negative, mean over the negatives "
            "(arXiv 2010.02666)."
        ),
    )
    weight: float = Field(
        default=1.0, ge=0, description="Factor of this part in the sum of the losses; 0: off."
    )
    contrastive_weight: float = Field(
        default=1.0, ge=0, description="Factor of training.loss in the sum; 0: the teacher alone decides."
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Divides the model's similarities. Null: training.temperature for kl, 1 for margin_mse. The loss is not "
            "multiplied by its square, so that it weighs as much as a contrastive one of the same temperature."
        ),
    )
    teacher_temperature: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Divides the teacher's scores, where they have another scale: sigmoids of a cross-encoder spread more than "
            "cosines. Null: as temperature."
        ),
    )
    teacher: str | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description=(
            "Of examples mined with several teachers, whose scores: a name as in mining.teachers, or mean, over all of "
            "them. Null: the scores by which the negatives were chosen (the first teacher's, or mining.rescoring's)."
        ),
    )
    unscored: Literal["fail", "skip"] = Field(
        default="fail",
        description=(
            "What a row without a teacher's scores does: fail stops the stage before its first step and names it; skip "
            "trains it by the contrastive loss alone and counts it."
        ),
    )
    sources: dict[str, SourceDistillation] = Field(
        default_factory=dict,
        description=(
            "Source name (or origin, where a stage has the mined examples by training.mix) -> its own weight and "
            "temperatures."
        ),
    )

    @model_validator(mode="after")
    def _every_row_teaches(self) -> "DistillationConfig":
        silent = sorted(name for name in self.sources if not self.of_source(name).weight)
        if not self.contrastive_weight and (self.unscored == "skip" or silent or not self.weight):
            where = (
                f"sources.{silent[0]}.weight is 0"
                if silent
                else "weight is 0"
                if not self.weight
                else "unscored is skip"
            )
            raise ValueError(
                f"contrastive_weight is 0 and {where}: such rows would have no loss; allowed: contrastive_weight above 0"
            )
        return self

    def of_source(self, name: str, temperature: float = 1.0) -> "SourceDistillation":
        """Weight and temperatures for a source's rows, all given.

        Args:
            name: of the source.
            temperature: of the contrastive loss, which is what kl has where nothing is said.
        """
        own = self.sources.get(name, SourceDistillation())
        default = temperature if self.loss == "kl" else 1.0
        student = own.temperature or self.temperature or default
        return SourceDistillation(
            weight=self.weight if own.weight is None else own.weight,
            temperature=student,
            teacher_temperature=own.teacher_temperature or self.teacher_temperature or student,
        )

    def reads(self, name: str) -> bool:
        """Whether the scores of a source's rows are wanted."""
        return bool(self.of_source(name).weight)


class Candidate(FrozenConfig):
    """One training run through all stages, which ends in a candidate; the candidates are then merged.

    What differs between the paper's six runs (arXiv 2511.07025 §6.4): mixes and hyper-parameters.
    """

    name: str = Field(
        pattern=r"^[a-z0-9_]+$",
        description=(
            "Name of the run: the folder training/NAME/, and what gate, merging and ablations call its model."
        ),
    )
    seed: int = Field(description="Seed of this run's order of examples and of all it draws.")
    learning_rate_scale: float = Field(
        default=1.0, gt=0, description="Factor of every stage's learning rate in this run."
    )
    mix: dict[str, float] | None = Field(
        default=None, description="Replaces training.mix in this run. Null: the section's."
    )
    loss: LossName | None = Field(
        default=None, description="Replaces training.loss in this run. Null: the section's."
    )
    temperature: float | None = Field(
        default=None, gt=0, description="Replaces training.temperature in this run. Null: the section's."
    )
    weight_decay: float | None = Field(
        default=None, ge=0, description="Replaces training.weight_decay in this run. Null: the section's."
    )
    distillation: DistillationConfig | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Replaces training.distillation in this run; weight 0: off. Null: the section's.",
    )
    stages: dict[str, StageChanges] = Field(
        default_factory=dict, description="Stage name -> what this run has otherwise in it."
    )


class MatryoshkaConfig(FrozenConfig):
    """Prefixes of the vectors that must work alone (arXiv 2205.13147): the loss is summed over all of them."""

    dimensions: tuple[int, ...] = Field(
        min_length=1,
        description=(
            "Lengths of the prefixes that must work alone, the whole vector among them if it shall keep "
            "its quality."
        ),
    )
    weights: tuple[float, ...] | None = Field(
        default=None, description="Weight of each length in the sum of the losses. Null: 1 each."
    )

    @model_validator(mode="after")
    def _dimensions_have_weights(self) -> "MatryoshkaConfig":
        if len(set(self.dimensions)) != len(self.dimensions) or min(self.dimensions) < 1:
            raise ValueError(
                f"matryoshka.dimensions must be different and 1 or more, found {list(self.dimensions)}"
            )
        if self.weights is not None:
            if len(self.weights) != len(self.dimensions):
                raise ValueError(
                    f"matryoshka has {len(self.weights)} weights for {len(self.dimensions)} dimensions"
                )
            if min(self.weights) <= 0:
                raise ValueError(f"matryoshka.weights must be above 0, found {list(self.weights)}")
        return self


def _allow_older_name_of_runs(schema: dict[str, Any]) -> None:
    """In the JSON Schema, as the section reads it: ``candidates`` in place of ``runs``."""
    schema["properties"]["candidates"] = {
        **schema["properties"]["runs"], "description": "Older name of `runs`.", "deprecated": True,
    }  # fmt: skip
    schema["required"].remove("runs")
    schema["oneOf"] = [{"required": ["runs"]}, {"required": ["candidates"]}]


class TrainingConfig(FrozenConfig):
    """Contrastive training on Ray Train and DeepSpeed."""

    model_config = ConfigDict(json_schema_extra=_allow_older_name_of_runs)

    runs: tuple[Candidate, ...] = Field(
        min_length=1,
        description=(
            "Training runs, each through all stages; each ends in a candidate, and the candidates are "
            "merged. 'candidates' is the older name of this key."
        ),
    )
    stages: tuple[TrainingStage, ...] = Field(
        min_length=1,
        description=(
            "Stages in order; each starts from the weights of the one before. The recipe has two (arXiv "
            "2511.07025 Table 8)."
        ),
    )
    mix: dict[str, float] = Field(
        default_factory=lambda: {"public": 0.5, "synthetic": 0.5},
        description=(
            "Origin -> share of the queries, for stages without sources: public (the sources' own pairs), "
            "synthetic (written by LLMs), in_domain. Shares are relative."
        ),
    )
    loss: LossName = Field(
        default="infonce",
        description=(
            "infonce: a query's own negatives only (the recipe's, arXiv 2511.07025 Eq. 1). gecko, qwen3, "
            "gemini: also documents, or queries, of the batch (arXiv 2403.20327, 2506.05176, 2503.07891); "
            "these gain from large batches."
        ),
    )
    qwen3_documents: Literal["all", "positives"] = Field(
        default="all",
        description=(
            "loss qwen3: which documents of other queries it compares with: all, positives and negatives "
            "(as arXiv 2511.07025 §6.1 reads the formula), or positives only."
        ),
    )
    temperature: float = Field(
        default=0.02,
        gt=0,
        description=(
            "Temperature of the softmax over cosines; lower weighs the hardest negatives more. 0.02 in "
            "the recipe (Table 8)."
        ),
    )
    repeat_negatives: bool = Field(
        default=True,
        description="true: a query with too few negatives repeats them in turn. false: it is a bad row.",
    )
    bad_rows: Literal["fail", "skip"] = Field(
        default="fail",
        description=(
            "What an example without query, positive or enough negatives does: fail stops the stage and "
            "names it, skip leaves it out and counts it."
        ),
    )
    matryoshka: MatryoshkaConfig | None = Field(
        default=None, description="Train prefixes of the vectors to work alone (arXiv 2205.13147). Null: off."
    )
    distillation: DistillationConfig | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Learn from the scores a teacher gave to each query's own documents, too. Null: off.",
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay.")
    adam_betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="AdamW's two decay rates of the moments; torch's defaults."
    )
    gradient_clip_norm: float = Field(
        default=1.0, gt=0, description="Largest norm of the gradient; a larger one is scaled down."
    )
    micro_batch_tokens: Annotated[int, Field(ge=64)] | Literal["auto"] = Field(
        default=4096,
        description=(
            "Tokens per forward pass of one worker. Changes memory and speed, not the result: a step's batch may take "
            "several passes (gradient caching, arXiv 2101.06983). auto: what the arithmetic of embedloom.core.memory finds "
            "to fit the worker's GPU, and no more than its share of a step; 4096 on a CPU."
        ),
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description=(
            "What DeepSpeed's ZeRO spreads over the workers: 0 nothing, 1 optimiser state, 2 gradients "
            "too, 3 weights too. Higher needs less memory and more traffic."
        ),
    )
    gradient_checkpointing: Recomputation = Field(
        default=False,
        description=(
            "Compute activations again in the backward pass instead of keeping them. true: of every layer, less memory "
            "and about a third more time. A number n: of every n-th layer, for 1/n of both. stages[] may have their own."
        ),
    )
    freeze_token_embeddings: bool = Field(
        default=False,
        description=(
            "Do not train the token embeddings. In a cut-down model they are most of the weights, and of "
            "the traffic between workers."
        ),
    )
    checkpoint_every_steps: int = Field(
        default=200,
        ge=1,
        description="Optimiser steps between checkpoints, from which a killed stage continues.",
    )
    checkpoints_kept: int = Field(default=2, ge=1, description="Newest checkpoints that stay on disk.")
    max_failures: int = Field(
        default=3, ge=0, description="Restarts of the worker group before the stage fails."
    )
    dev: DevScoring | None = Field(
        default=None, description="Score development tasks while training. Null: off."
    )
    lora: LoraConfig | None = Field(
        default=None, description="Train low-rank adapters instead of all weights. Null: all weights."
    )
    trackers: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description="Where metrics go beside metrics.jsonl; wandb and mlflow need their extra installed.",
    )
    parity: tuple[ParityReader, ...] = Field(
        default=PARITY_READERS,
        description=(
            "Programs that must read the exported model as it was trained, to a cosine of 0.9999 "
            "(float32) or 0.999 (bfloat16). vllm starts an engine, half a minute on a CPU."
        ),
    )

    @field_validator("trackers", "parity")
    @classmethod
    def _named_once(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        return check_different(value, str(info.field_name))

    @model_validator(mode="before")
    @classmethod
    def _older_name_of_runs(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "candidates" not in value:
            return value
        if "runs" in value:
            raise ValueError("runs and candidates are two names of one list; allowed: runs")
        return {"runs" if key == "candidates" else key: item for key, item in value.items()}

    @field_validator("mix")
    @classmethod
    def _known_origins(cls, value: dict[str, float]) -> dict[str, float]:
        return check_mix(value)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "TrainingConfig":
        for label, names in (
            ("runs", [run.name for run in self.runs]),
            ("stages", [stage.name for stage in self.stages]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{label} must have different names, found {names}")
        return self

    @model_validator(mode="after")
    def _lora_trains_what_it_says(self) -> "TrainingConfig":
        if self.lora is not None and self.freeze_token_embeddings:
            raise ValueError(
                "freeze_token_embeddings is set beside lora, which freezes all weights of the base; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _runs_fit(self) -> "TrainingConfig":
        for run in self.runs:
            config = self.of_run(run)
            check_mix(config.mix)
            for stage in config.stages:
                if stage.negatives == 0 and config.loss == "infonce":
                    raise ValueError(
                        f"stages.{stage.name}.negatives is 0 in run {run.name!r}, but infonce knows no other negatives; "
                        "allowed: 1 or more, or loss gecko, qwen3 or gemini"
                    )
            if config.distillation is not None:
                config.check_distillation(config.distillation)
        return self

    def check_distillation(self, section: DistillationConfig) -> None:
        """Refuse a part that has nothing to read in some stage, and names that no stage has.

        Raises:
            ValueError: naming the stage, and its source where that is what does not fit.
        """
        known = {source.name for stage in self.stages for source in stage.sources}
        if not all(stage.sources for stage in self.stages):
            known |= set(self.mix)
        if unknown := sorted(set(section.sources) - known):
            raise ValueError(
                f"distillation.sources: {unknown[0]!r} is no source of a stage; allowed: {', '.join(sorted(known))}"
            )
        for stage in self.stages:
            if section.weight and stage.negatives == 0:
                raise ValueError(
                    f"stages.{stage.name}.negatives is 0, but distillation compares a query's own documents; allowed: 1 or more"
                )
            for source in stage.sources:
                without = source.format not in SCORED_FORMATS and section.unscored == "fail"
                if without and section.reads(source.name):
                    raise ValueError(
                        f"stages.{stage.name}.sources.{source.name}: format {source.format} has no teacher's scores for "
                        f"distillation; allowed: format {', '.join(sorted(SCORED_FORMATS))}, "
                        f"distillation.sources.{source.name}.weight: 0, or distillation.unscored: skip"
                    )

    def recomputed_layers(self, stage: TrainingStage) -> int:
        """Every how many layers a stage computes activations again in the backward pass; 0: it keeps them all."""
        own = stage.gradient_checkpointing
        return int(self.gradient_checkpointing if own is None else own)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The runs, by what they end in."""
        return self.runs

    def of_run(self, run: Candidate) -> "TrainingConfig":
        """The section as one run has it: its changes applied, no other run in it.

        Raises:
            ValueError: a change of a stage or source that is not there.
        """
        names = [stage.name for stage in self.stages]
        if unknown := sorted(set(run.stages) - set(names)):
            raise ValueError(f"run {run.name!r} changes stage {unknown[0]!r}; allowed: {', '.join(names)}")
        changed = {name: getattr(run, name) for name in _RUN_KEYS if getattr(run, name) is not None}
        alone = Candidate(name=run.name, seed=run.seed, learning_rate_scale=run.learning_rate_scale)
        return self.model_copy(
            update={
                **changed,
                "runs": (alone,),
                "stages": tuple(
                    run.stages[stage.name].of(stage) if stage.name in run.stages else stage
                    for stage in self.stages
                ),
            }
        )


_RUN_KEYS = (
    "mix",
    "loss",
    "temperature",
    "weight_decay",
    "distillation",
)  # of a run, in place of the section's own


def check_mix(mix: dict[str, float]) -> dict[str, float]:
    """Shares per origin: known names, none negative, a positive sum."""
    unknown = sorted(set(mix) - set(ORIGINS))
    if unknown:
        raise ValueError(f"unknown origin {unknown[0]!r} in mix; allowed: {list(ORIGINS)}")
    if any(share < 0 for share in mix.values()) or sum(mix.values()) <= 0:
        raise ValueError(f"the shares of a mix must be 0 or more and sum to something positive, found {mix}")
    return mix
