"""Families of synthetic pairs: one section each, told apart by ``family`` (recipe: arXiv 2401.00368, 2511.07025 §4.3)."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.languages import check_languages

Weights = dict[str, float]  # ISO 639-3 code -> weight


class FamilyConfig(FrozenConfig):
    """What every family has."""

    family: str = Field(description="Kind of rows that this section writes; decides which other keys it has.")
    rows: int = Field(
        ge=1,
        description=(
            "Accepted rows wanted, over all generators and languages. Refused answers are asked for "
            "again, up to max_attempts_per_row."
        ),
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        description=(
            "Name of the section in files and reports, needed where a family stands twice. Null: the "
            "family's name."
        ),
    )
    languages: Weights | None = Field(
        default=None,
        description="ISO 639-3 code -> weight: languages of the queries. Null: synthesis.languages.",
    )
    document_languages: Weights | None = Field(
        default=None,
        description=(
            "ISO 639-3 code -> weight: languages of the text on the other side. Null: the query's own "
            "language. bitext needs it."
        ),
    )
    prompt: str | None = Field(
        default=None,
        description=(
            "Prompt of the generator: a name in embedloom/synthesis/prompts, or the path of a .yaml file "
            "of yours. Null: the family's own, which has a variant for small generators."
        ),
    )
    instruction: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Instruction of these rows in training. Null: the brainstormed task's sentence where the "
            "family has tasks, else the prompt's."
        ),
    )
    sampling_temperature: float | None = Field(
        default=None,
        ge=0,
        description="Temperature at which the generator draws tokens; 0 is greedy. Null: synthesis.sampling's.",
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description=(
            "Nucleus sampling: tokens are drawn from the most likely ones that sum to this probability. "
            "Null: synthesis.sampling's."
        ),
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=8,
        description="Longest answer, in tokens of the generator. Null: synthesis.sampling's.",
    )

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

    tasks_prompt: str | None = Field(
        default=None,
        description=(
            "Prompt by which tasks are brainstormed: a name in embedloom/synthesis/prompts or the path of "
            "a .yaml file. Null: the family's own."
        ),
    )
    tasks_per_answer: int = Field(
        default=20,
        ge=1,
        le=50,
        description=(
            "Task sentences asked for in one answer; arXiv 2401.00368 asks for about 20 at a time. Small "
            "generators manage 1."
        ),
    )
    max_task_characters: int = Field(
        default=200, ge=20, description="Longest task sentence, in characters; longer ones are refused."
    )


class SeedQueriesConfig(FamilyConfig):
    """Queries for documents of the corpus; negatives are mined later."""

    family: Literal["seed_queries"] = Field(
        default="seed_queries",
        description=(
            "seed_queries: queries that an LLM writes for documents of the corpus; negatives are mined later."
        ),
    )
    queries_per_document: int = Field(
        default=1, ge=1, le=16, description="Queries that one answer holds for its document."
    )
    max_document_characters: int = Field(
        default=2400,
        ge=50,
        description=(
            "Characters of the document that the prompt shows; the rest is cut. The default is about 600 "
            "tokens of English."
        ),
    )
    max_query_characters: int = Field(
        default=160, ge=10, description="Longest query, in characters; longer ones are refused."
    )


class ShortLongConfig(TaskFamilyConfig):
    """A short query, a document that answers it and one that only seems to."""

    family: Literal["short_long"] = Field(
        default="short_long",
        description=("short_long: a short query, a document that answers it and one that only seems to."),
    )
    max_query_characters: int = Field(
        default=200, ge=10, description="Longest query, in characters; longer ones are refused."
    )
    max_document_characters: int = Field(
        default=4000, ge=50, description="Longest document, in characters; longer ones are refused."
    )


class LongLongConfig(TaskFamilyConfig):
    """Two long texts that match, and a third that does not."""

    family: Literal["long_long"] = Field(
        default="long_long", description="long_long: two long texts that match, and a third that does not."
    )
    max_document_characters: int = Field(
        default=4000, ge=50, description="Longest text, in characters; longer ones are refused."
    )


class ShortShortConfig(TaskFamilyConfig):
    """Two phrases or sentences that match, and a third that does not."""

    family: Literal["short_short"] = Field(
        default="short_short",
        description="short_short: two phrases or sentences that match, and a third that does not.",
    )
    max_query_characters: int = Field(
        default=200, ge=10, description="Longest text, in characters; longer ones are refused."
    )


class ClassificationConfig(TaskFamilyConfig):
    """A text, its label and misleading labels; the task's sentence is the training instruction (§6.2)."""

    family: Literal["classification"] = Field(
        default="classification",
        description=(
            "classification: a text, its label and misleading labels; the task's sentence is the training "
            "instruction (arXiv 2511.07025 §6.2)."
        ),
    )
    misleading_labels: int = Field(
        default=4,
        ge=1,
        le=16,
        description="Wrong labels asked for beside the right one; they are the row's negatives.",
    )
    max_text_characters: int = Field(
        default=2000, ge=20, description="Longest text to classify, in characters; longer ones are refused."
    )
    max_label_characters: int = Field(
        default=60, ge=3, description="Longest label, in characters; longer ones are refused."
    )


class STSConfig(FamilyConfig):
    """Three texts: the first two near in meaning, the third less so, by target scores of 1 to 5."""

    family: Literal["sts"] = Field(
        default="sts",
        description=(
            "sts: three texts, the first two near in meaning, the third less so, by target scores of 1 to 5."
        ),
    )
    max_text_characters: int = Field(
        default=600, ge=20, description="Longest text, in characters; longer ones are refused."
    )


class BitextConfig(FamilyConfig):
    """A text, a good translation and a subtly wrong one; ``document_languages`` are the translations'."""

    family: Literal["bitext"] = Field(
        default="bitext",
        description=(
            "bitext: a text, a good translation and a subtly wrong one; document_languages are those of "
            "the translations."
        ),
    )
    max_text_characters: int = Field(
        default=600, ge=20, description="Longest text, in characters; longer ones are refused."
    )

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

    family: Literal["existing_questions"] = Field(
        default="existing_questions",
        description=(
            "existing_questions: lines that start with 'Question:' at the end of documents (Nemotron-CC "
            "Diverse-QA, arXiv 2511.07025 §4.1); no LLM is asked."
        ),
    )
    questions_per_document: int = Field(
        default=1, ge=1, le=16, description="Most questions taken of one document."
    )
    min_document_characters: int = Field(
        default=50, ge=1, description="Fewest characters of what is left of a document without its questions."
    )
    max_query_characters: int = Field(
        default=300, ge=10, description="Longest question, in characters; longer ones are refused."
    )


class TranslationConfig(FamilyConfig):
    """Existing pairs, translated into ``languages``."""

    family: Literal["translation"] = Field(
        default="translation",
        description="translation: existing pairs, translated into the section's languages.",
    )
    pairs: Literal["corpus", "synthetic"] = Field(
        default="corpus",
        description=(
            "Which pairs are translated: corpus, the natural ones of the train split, or synthetic, rows "
            "that this stage wrote before."
        ),
    )
    sides: Literal["query", "both"] = Field(
        default="query", description="What is translated: query, or both query and document."
    )
    max_query_characters: int = Field(
        default=300, ge=10, description="Longest translated query, in characters; longer ones are refused."
    )
    max_document_characters: int = Field(
        default=2400,
        ge=50,
        description="Characters of the document that the prompt shows, and longest translated document.",
    )


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
