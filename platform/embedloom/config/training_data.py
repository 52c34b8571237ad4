"""The sources of a training mix."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.records import TASK_TYPES

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
