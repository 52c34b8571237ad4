"""What a synthetic row must pass before it is kept; every check can be switched off with null or false."""

from typing import Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig


class LanguageCheck(FrozenConfig):
    """A text is refused if another language is this likely; short texts are not judged."""

    min_probability: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="A text is refused if the language detector gives another language at least this probability.",
    )
    min_letters: int = Field(
        default=20,
        ge=1,
        description="Texts with fewer letters are not judged: the detector errs on short ones.",
    )


class NearDuplicateCheck(FrozenConfig):
    """Of rows whose queries share this much of their character 5-grams (Jaccard), the first stays."""

    threshold: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description=(
            "Jaccard similarity of character 5-grams (0-1) from which two queries count as the same; the "
            "first stays."
        ),
    )
    scope: Literal["generator", "all"] = Field(
        default="all",
        description="generator: compared within each generator's rows. all: across generators as well.",
    )


class ContaminationCheck(FrozenConfig):
    """No row may share a text, or too many of its 13-grams, with an evaluation text."""

    files: tuple[str, ...] = Field(
        default=(), description="Evaluation texts to keep out: Parquet or JSONL files or globs."
    )
    columns: tuple[str, ...] = Field(
        default=("query", "text", "sentence1", "sentence2"),
        description="Columns of those files that are read, where a file has them.",
    )
    heldout: bool = Field(
        default=True, description="Whether the run's own dev and test splits are kept out too."
    )
    max_share: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description=(
            "Largest allowed share (0-1) of a text's word 13-grams that stand in evaluation texts; a text "
            "that equals one is always refused."
        ),
    )

    @model_validator(mode="after")
    def _guards_something(self) -> "ContaminationCheck":
        if not self.files and not self.heldout:
            raise ValueError("contamination has neither files nor heldout: true; use null to switch it off")
        return self


class RoundTripCheck(FrozenConfig):
    """A query is kept if the first mining teacher ranks its document among the ``top_k``."""

    top_k: int = Field(
        default=20,
        ge=1,
        description="The first mining teacher must rank the query's own document among this many.",
    )


class JudgeCheck(FrozenConfig):
    """An LLM grades a row from 1 to 10; NVIDIA's retrieval recipe keeps 7 and above."""

    model: str = Field(
        description=(
            "LLM that grades rows: a folder, a Hugging Face id or a registry name, as a generator's model."
        )
    )
    prompt: str = Field(
        default="judge",
        description="Prompt of the judge: a name in embedloom/synthesis/prompts or the path of a .yaml file.",
    )
    threshold: float = Field(
        default=7.0,
        ge=1,
        le=10,
        description="Lowest grade that is kept, of 1 to 10; NVIDIA's retrieval recipe keeps 7 and above.",
    )
    max_characters: int = Field(
        default=2400, ge=50, description="Characters of each text that the judge is shown; the rest is cut."
    )


class QualityConfig(FrozenConfig):
    """The checks, in the order in which they run; the cheap ones look at a row alone."""

    language: LanguageCheck | None = Field(
        default=LanguageCheck(), description="Refuse texts in another language than asked for. Null: off."
    )
    min_query_characters: int = Field(
        default=3, ge=1, description="Fewest characters of a query; shorter ones are refused."
    )
    min_text_characters: int = Field(
        default=1, ge=1, description="Fewest characters of a positive or negative; shorter ones are refused."
    )
    label_leak: bool = Field(
        default=True, description="Refuse a text to classify that holds a word of its label."
    )
    copies: bool = Field(
        default=True, description="Refuse a query that stands word for word in its document."
    )
    exact_duplicates: bool = Field(
        default=True,
        description="Refuse a query that another row has already, but for case, blanks and compatibility forms.",
    )
    near_duplicates: NearDuplicateCheck | None = Field(
        default=NearDuplicateCheck(),
        description="Refuse queries that are nearly equal to an earlier one. Null: off.",
    )
    contamination: ContaminationCheck | None = Field(
        default=ContaminationCheck(),
        description="Refuse rows that share text with evaluation data. Null: off.",
    )
    round_trip: RoundTripCheck | None = Field(
        default=None, description="Keep a query only if a teacher finds its document. Null: off."
    )
    judge: JudgeCheck | None = Field(
        default=None, description="Keep a row only if an LLM grades it well. Null: off."
    )
