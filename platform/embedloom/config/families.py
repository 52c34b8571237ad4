"""Families of synthetic pairs: one section each, told apart by ``family`` (recipe: arXiv 2401.00368, 2511.07025 §4.3)."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.languages import check_languages

Weights = dict[str, float]  # ISO 639-3 code -> weight


class FamilyConfig(FrozenConfig):
    """What every family has.

    ``languages`` are those of the query; ``document_languages`` those of the text on the other side, null: the
    query's own. A null prompt is the family's own, which has a variant for small generators.
    """

    family: str
    rows: int = Field(ge=1)  # accepted rows wanted, over all generators and languages
    name: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9_-]*$")  # null: the family
    languages: Weights | None = None  # null: the section's
    document_languages: Weights | None = None
    prompt: str | None = None  # null, a name in embedloom/synthesis/prompts, or the path of a .yaml file
    instruction: str | None = Field(default=None, min_length=1)  # null: the task's sentence or the prompt's
    sampling_temperature: float | None = Field(default=None, ge=0)  # null: the section's
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=8)

    @field_validator("languages", "document_languages")
    @classmethod
    def _languages_are_known(cls, weights: Weights | None) -> Weights | None:
        if weights is not None:
            check_languages(weights)
        return weights

    def document_weights(self, language: str) -> Weights:
        """Languages of the other side for queries of ``language``, by weight."""
        return self.document_languages or {language: 1.0}

    @property
    def key(self) -> str:
        """Name of the section in cells, files and reports."""
        return self.name or self.family


class TaskFamilyConfig(FamilyConfig):
    """A family written from scratch, after a list of tasks has been brainstormed (two steps)."""

    tasks_prompt: str | None = None  # null: the family's own
    tasks_per_answer: int = Field(default=20, ge=1, le=50)  # arXiv 2401.00368 asks for about 20 at a time
    max_task_characters: int = Field(default=200, ge=20)


class SeedQueriesConfig(FamilyConfig):
    """Queries for documents of the corpus (strategy S2); negatives are mined later."""

    family: Literal["seed_queries"] = "seed_queries"
    queries_per_document: int = Field(default=1, ge=1, le=16)
    max_document_characters: int = Field(default=2400, ge=50)  # of the document, as the prompt shows it
    max_query_characters: int = Field(default=160, ge=10)


class ShortLongConfig(TaskFamilyConfig):
    """A short query, a document that answers it and one that only seems to (strategy S1)."""

    family: Literal["short_long"] = "short_long"
    max_query_characters: int = Field(default=200, ge=10)
    max_document_characters: int = Field(default=4000, ge=50)


class LongLongConfig(TaskFamilyConfig):
    """Two long texts that match, and a third that does not."""

    family: Literal["long_long"] = "long_long"
    max_document_characters: int = Field(default=4000, ge=50)


class ShortShortConfig(TaskFamilyConfig):
    """Two phrases or sentences that match, and a third that does not."""

    family: Literal["short_short"] = "short_short"
    max_query_characters: int = Field(default=200, ge=10)


class ClassificationConfig(TaskFamilyConfig):
    """A text, its label and misleading labels; the task's sentence is the training instruction (§6.2)."""

    family: Literal["classification"] = "classification"
    misleading_labels: int = Field(default=4, ge=1, le=16)
    max_text_characters: int = Field(default=2000, ge=20)
    max_label_characters: int = Field(default=60, ge=3)


class STSConfig(FamilyConfig):
    """Three texts: the first two near in meaning, the third less so, by target scores of 1 to 5."""

    family: Literal["sts"] = "sts"
    max_text_characters: int = Field(default=600, ge=20)


class BitextConfig(FamilyConfig):
    """A text, a good translation and a subtly wrong one; ``document_languages`` are the translations'."""

    family: Literal["bitext"] = "bitext"
    max_text_characters: int = Field(default=600, ge=20)

    @model_validator(mode="after")
    def _translates(self) -> "BitextConfig":
        if self.document_languages is None:
            raise ValueError("bitext needs document_languages, the languages translated into")
        for language in self.languages or {}:
            self.document_weights(language)
        return self

    def document_weights(self, language: str) -> Weights:
        """Languages to translate into, the text's own left out.

        Raises:
            ValueError: none is left.
        """
        others = {
            code: weight for code, weight in (self.document_languages or {}).items() if code != language
        }
        if not others:
            raise ValueError(
                f"bitext: document_languages has no language but {language!r}, that of the text itself"
            )
        return others


class ExistingQuestionsConfig(FamilyConfig):
    """``Question:`` lines that documents already end with (Nemotron-CC Diverse-QA, §4.1); no LLM is asked."""

    family: Literal["existing_questions"] = "existing_questions"
    questions_per_document: int = Field(default=1, ge=1, le=16)
    min_document_characters: int = Field(default=50, ge=1)  # of what is left without the questions
    max_query_characters: int = Field(default=300, ge=10)


class TranslationConfig(FamilyConfig):
    """Existing pairs, translated into ``languages`` (strategy S3)."""

    family: Literal["translation"] = "translation"
    pairs: Literal["corpus", "synthetic"] = "corpus"  # of the train split, or rows this stage wrote before
    sides: Literal["query", "both"] = "query"
    max_query_characters: int = Field(default=300, ge=10)
    max_document_characters: int = Field(default=2400, ge=50)


FamilyUnion = Annotated[
    SeedQueriesConfig
    | ShortLongConfig
    | LongLongConfig
    | ShortShortConfig
    | ClassificationConfig
    | STSConfig
    | BitextConfig
    | ExistingQuestionsConfig
    | TranslationConfig,
    Field(discriminator="family"),
]
