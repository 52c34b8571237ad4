"""Section ``mining``: who scores candidates, and which of them become hard negatives."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.teacher import Teacher, check_template
from embedloom.instructions import DEFAULT_INSTRUCTIONS


class SelectionConfig(FrozenConfig):
    """Which candidates become negatives; changing it builds the examples again, without mining again.

    Methods and best settings: NV-Retriever (arXiv 2407.15831, §3 and §4.3). Scores are the teacher's.
    """

    method: Literal["perc_pos", "margin_pos", "abs", "shift", "naive"] = "perc_pos"
    negatives: int = Field(default=4, ge=1)  # wanted per example
    min_negatives: int = Field(default=1, ge=1)  # an example with fewer is rejected, and counted
    margin_ratio: float = Field(default=0.95, gt=0, le=1)  # perc_pos: below ratio x the positive's score
    margin: float = Field(default=0.05, ge=0)  # margin_pos: below the positive's score - margin
    max_score: float = 0.7  # abs: below this
    shift: int = Field(default=10, ge=0)  # shift: without the best so many
    min_score: float | None = None  # any method: not below this
    sample_from: int | None = Field(
        default=None, ge=1
    )  # draw from the best so many that survive; null: the best
    sample_temperature: float = Field(default=0.05, gt=0)  # of the softmax over their scores
    keep_best: bool = False  # with sample_from: the best survivor always, the others drawn
    blend: Literal["first", "cross_sample", "intra_sample", "intra_sample_duplicates"] = "first"

    @model_validator(mode="after")
    def _counts_fit(self) -> "SelectionConfig":
        if self.min_negatives > self.negatives:
            raise ValueError(f"min_negatives is {self.min_negatives}, above negatives {self.negatives}")
        if self.sample_from is not None and self.sample_from < self.negatives:
            raise ValueError(f"sample_from is {self.sample_from}, below negatives {self.negatives}")
        return self


class RescoringConfig(FrozenConfig):
    """A cross-encoder that scores the best candidates again; the selection rules then read its scores alone.

    They are sigmoids, which spread over 0 to 1 where cosines crowd, so the rules' numbers (0.95 was found for
    cosines) are to be chosen anew. A reranking LLM saved by sentence-transformers' CrossEncoder works the same way.
    """

    model: str = Field(min_length=1)  # a folder or Hugging Face id, one label
    top: int = Field(default=50, ge=1)  # candidates per query: each teacher's best in turn
    max_tokens: int = Field(default=512, ge=8)  # query and document together
    query_template: str = "{text}"  # {instruction} and {text}; documents are read as they are
    batch_size: int = Field(default=32, ge=1)  # pairs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @field_validator("query_template")
    @classmethod
    def _template_holds_the_text(cls, value: str) -> str:
        return check_template(value)


class AuditConfig(FrozenConfig):
    """A second opinion on the selected negatives."""

    judge: Teacher | None = None  # null: no second teacher looks
    sample: int = Field(default=300, ge=10)  # queries, of each the first negative with and without the rules


class MiningConfig(FrozenConfig):
    """Candidates by teachers, positive-aware hard negatives among them."""

    teachers: tuple[Teacher, ...] = Field(min_length=1)
    top_k: int = Field(
        default=50, ge=1, le=2048
    )  # candidates kept per query and teacher, all with their scores
    max_query_tokens: int = Field(default=64, ge=8)
    max_document_tokens: int = Field(default=256, ge=8)
    shard_rows: int = Field(default=2048, ge=1)
    memory_gib: float = Field(default=4.0, gt=0)  # vectors one search actor keeps; the rest streams from disk
    instructions: dict[str, str] = Field(default_factory=lambda: dict(DEFAULT_INSTRUCTIONS))
    rescoring: RescoringConfig | None = None  # null: the rules read the teachers' scores
    selection: SelectionConfig = SelectionConfig()
    audit: AuditConfig = AuditConfig()

    @field_validator("teachers")
    @classmethod
    def _teachers_differ(cls, value: tuple[Teacher, ...]) -> tuple[Teacher, ...]:
        names = [teacher.model for teacher in value]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers must be different models, found {names}")
        return value

    @model_validator(mode="after")
    def _candidates_cover_negatives(self) -> "MiningConfig":
        if self.top_k <= self.selection.negatives:
            raise ValueError(
                f"top_k is {self.top_k}, it must be above selection.negatives ({self.selection.negatives})"
            )
        return self

    @model_validator(mode="after")
    def _rescoring_fits(self) -> "MiningConfig":
        if self.rescoring is None:
            return self
        if not self.selection.negatives < self.rescoring.top <= self.top_k:
            raise ValueError(
                f"rescoring.top is {self.rescoring.top}, it must be above selection.negatives "
                f"({self.selection.negatives}) and not above top_k ({self.top_k})"
            )
        if self.selection.blend != "first":
            raise ValueError(
                f"selection.blend is {self.selection.blend!r}, but with rescoring there is one list; allowed: 'first'"
            )
        return self
