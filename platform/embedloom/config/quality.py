"""What a synthetic row must pass before it is kept; every check can be switched off with null or false."""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig


class LanguageCheck(FrozenConfig):
    """A text is refused if another language is this likely; short texts are not judged."""

    min_probability: float = Field(default=0.9, gt=0, le=1)
    min_letters: int = Field(default=20, ge=1)


class NearDuplicateCheck(FrozenConfig):
    """Of rows whose queries share this much of their character 5-grams (Jaccard), the first stays."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    scope: Literal["generator", "all"] = "all"  # within each generator's rows, or across generators as well


class ContaminationCheck(FrozenConfig):
    """No row may share a text, or too many of its 13-grams, with an evaluation text.

    ``files`` are Parquet or JSONL files or globs; ``heldout`` adds the run's own dev and test split.
    """

    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("query", "text", "sentence1", "sentence2")  # those a file has are read
    heldout: bool = True
    max_share: float = Field(default=0.3, ge=0, lt=1)  # of a longer text's 13-grams

    @model_validator(mode="after")
    def _guards_something(self) -> "ContaminationCheck":
        if not self.files and not self.heldout:
            raise ValueError("contamination has neither files nor heldout: true; use null to switch it off")
        return self


class RoundTripCheck(FrozenConfig):
    """A query is kept if the first mining teacher ranks its document among the ``top_k``."""

    top_k: int = Field(default=20, ge=1)


class JudgeCheck(FrozenConfig):
    """An LLM grades a row from 1 to 10; NVIDIA's retrieval recipe keeps 7 and above."""

    model: str
    prompt: str = "judge"
    threshold: float = Field(default=7.0, ge=1, le=10)
    max_characters: int = Field(default=2400, ge=50)  # of each text shown to the judge


class QualityConfig(FrozenConfig):
    """The checks, in the order in which they run; the cheap ones look at a row alone."""

    language: LanguageCheck | None = LanguageCheck()
    min_query_characters: int = Field(default=3, ge=1)
    min_text_characters: int = Field(default=1, ge=1)  # of positives and negatives
    label_leak: bool = True  # no word of the label in the text to classify
    copies: bool = True  # no query that stands word for word in its document
    exact_duplicates: bool = True
    near_duplicates: NearDuplicateCheck | None = NearDuplicateCheck()
    contamination: ContaminationCheck | None = ContaminationCheck()
    round_trip: RoundTripCheck | None = None
    judge: JudgeCheck | None = None
