"""Section ``synthesis``: which LLMs write rows, of which families, in which languages, and what is kept."""

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.cluster import PoolConfig
from embedloom.core.text import check_languages

# Families of synthetic pairs: one section each, told apart by ``family`` (recipe: arXiv 2401.00368, 2511.07025 §4.3).


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


# What a synthetic row must pass before it is kept; every check can be switched off with null or false.


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


class EndpointConfig(FrozenConfig):
    """An OpenAI-compatible server that writes or grades in place of an engine of ours."""

    url: str = Field(
        pattern=r"^https?://[^@\s]+$",
        description="Base address of the server, up to and with /v1; /chat/completions is added. A key never stands in it.",
    )
    model: str = Field(min_length=1, description="What the server calls the model.")
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the API key where the actor runs; never the key itself. Null: none is sent.",
    )
    answer_format: Literal["json_schema", "json_schema_strict", "json_object", "none"] = Field(
        default="json_schema",
        description=(
            "How the server is asked for JSON (response_format). json_schema: with the answer's schema, as vLLM, SGLang and "
            "llama.cpp take it. json_schema_strict: strict, without the bounds of lengths that OpenAI refuses. json_object or "
            "none: the schema stands in the last message. Whatever it sends is checked."
        ),
    )
    token_limit_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens",
        description="Name of the answer's token limit in requests; newer models of OpenAI want max_completion_tokens.",
    )
    send_seed: bool = Field(
        default=True, description="Whether requests carry a seed; some servers refuse it."
    )
    system_role: bool = Field(
        default=True,
        description="False: what the system message says is put before the user's, for models without that role.",
    )
    extra_body: dict[str, Any] = Field(
        default={},
        description="Further keys of every request, such as reasoning_effort: low or provider: {...}.",
    )
    max_concurrency: int = Field(
        default=64,
        ge=1,
        le=2048,
        description=(
            "Most requests in flight. Fewer are sent to begin with; one more for each round of answers, half as many after 429, "
            "503 or a time-out (AIMD)."
        ),
    )
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="Requests sent a minute at most. Null: as many as the server takes."
    )
    tokens_per_minute: float | None = Field(
        default=None,
        gt=0,
        description="Tokens a minute at most, of prompts and answers together. Null: as many as the server takes.",
    )
    timeout_seconds: float = Field(default=300.0, gt=0, description="Seconds that a request may take.")
    max_retries: int = Field(
        default=8,
        ge=0,
        description=(
            "Repetitions of a request after 408, 409, 425, 429, 5xx, a broken connection or half an answer, with growing pauses, "
            "or after what Retry-After says."
        ),
    )
    input_price: float | None = Field(
        default=None,
        ge=0,
        description="Price of a million prompt tokens, in the currency of budget. Null: unknown.",
    )
    output_price: float | None = Field(
        default=None,
        ge=0,
        description="Price of a million answer tokens, in the currency of budget. Null: unknown.",
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Most money that may be spent here for one artefact, over all its runs; needs both prices. A request is sent only if "
            "the budget holds its dearest answer too. Raise it and run again: answers that were paid for count. Null: no cap."
        ),
    )

    @model_validator(mode="after")
    def _budget_has_prices(self) -> "EndpointConfig":
        if self.budget is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("budget needs input_price and output_price, in money for a million tokens")
        for key in ("model", "messages", "stream", "n"):
            if key in self.extra_body:
                raise ValueError(f"extra_body: {key} is set by embedloom; allowed: other keys of a request")
        return self

    def facts(self) -> dict[str, Any]:
        """What of it decides the rows: the same model at another address, price or pace writes the same."""
        keys = {"model", "answer_format", "token_limit_key", "send_seed", "system_role", "extra_body"}
        return self.model_dump(mode="json", include=keys)

    def cost(self, prompt_tokens: int, output_tokens: int) -> float | None:
        """Money for so many tokens; None where a price is unknown."""
        if self.input_price is None or self.output_price is None:
            return None
        return (prompt_tokens * self.input_price + output_tokens * self.output_price) / 1e6


_ENDPOINT = (
    "An OpenAI-compatible server that answers in place of an engine of ours. Null: vLLM runs the model here."
)


def _named_by_endpoint(values: Any) -> Any:
    """The model's name, where only the endpoint states it."""
    endpoint = values.get("endpoint") if isinstance(values, dict) else None
    if endpoint is None or values.get("model"):
        return values
    named = endpoint.get("model") if isinstance(endpoint, dict) else endpoint.model
    return {**values, "model": named or ""}


def _refuse_nameless(model: str, where: str) -> None:
    if not model:
        raise ValueError(f"{where} has no model; give model, or endpoint with the model that its server has")


class JudgeCheck(FrozenConfig):
    """An LLM grades a row from 1 to 10; NVIDIA's retrieval recipe keeps 7 and above."""

    model: str = Field(
        default="",
        description=(
            "LLM that grades rows: a folder, a Hugging Face id or a registry name, as a generator's model. With endpoint: "
            "what files call it; the server's name of the model unless you say otherwise."
        ),
    )
    endpoint: EndpointConfig | None = Field(
        default=None, exclude_if=lambda value: value is None, description=_ENDPOINT
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

    @model_validator(mode="before")
    @classmethod
    def _endpoint_names_it(cls, values: Any) -> Any:
        return _named_by_endpoint(values)

    @model_validator(mode="after")
    def _has_a_model(self) -> "JudgeCheck":
        _refuse_nameless(self.model, "judge")
        return self


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


ReasoningParser = Literal["openai_gptoss", "qwen3", "deepseek_r1"]  # names of vLLM's parsers
# What models of a family write before they answer, by what their names say; the first that fits counts. Qwen3's "Instruct"
# models of July 2025 do not think.
_REASONING: tuple[tuple[str, ReasoningParser | None], ...] = (
    (r"gpt-oss", "openai_gptoss"),
    (r"qwen3.*instruct", None),
    (r"qwen3", "qwen3"),
    (r"deepseek-r1", "deepseek_r1"),
)


def proposed_parser(model: str) -> ReasoningParser | None:
    """The parser that a model's name asks for; None: its answers are all answer."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((parser for pattern, parser in _REASONING if re.search(pattern, name)), None)


class EngineOptions(FrozenConfig):
    """How vLLM runs one generator.

    A text depends on what else is decoded in the same step (the shape of a matrix product decides how it rounds):
    measured with SmolLM2 on CPU in bfloat16, 2 of 32 texts change when 8 instead of 32 prompts are in the batch. One
    shard in flight makes a step's company a function of the shard alone, so a rerun gives the same texts; more in
    flight keep the batch full through a long tail, and then texts, never ids lost or twice, may differ between runs.
    """

    max_model_tokens: int = Field(
        default=1024,
        ge=128,
        description="Longest prompt and answer together, in tokens; decides how much cache a sequence may need.",
    )
    sequences: int | None = Field(
        default=None, ge=1, description="Answers decoded together. Null: 32 on CPU, vLLM's own number on GPU."
    )
    kv_cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="Key-value cache, in GiB. Null: 1 on CPU, what gpu_memory_share leaves on GPU.",
    )
    gpu_memory_share: float = Field(
        default=0.9, gt=0, le=1, description="Share of a GPU's memory for weights and cache together (0-1)."
    )
    prefix_caching: bool = Field(
        default=False,
        description=(
            "Reuse the cache of equal prompt beginnings. Faster, but a cached prefix rounds differently, "
            "so a rerun may give other texts."
        ),
    )
    shards_in_flight: int | None = Field(
        default=None,
        ge=1,
        le=16,
        description=(
            "Shards decoded at once. One gives the same texts on every rerun; more keep the batch full "
            "while long answers end, and texts may then differ between runs. Null: 1 on CPU, 4 on GPU."
        ),
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description=(
            "Number type of the computation. auto: on CPU bfloat16 if in hardware, on GPU the model's own."
        ),
    )
    batch_invariant: bool = Field(
        default=False,
        description=(
            "vLLM's batch-invariant kernels (CUDA only, slower): the same texts on every rerun with "
            "several shards in flight."
        ),
    )
    reasoning_parser: ReasoningParser | Literal["auto"] | None = Field(
        default="auto",
        exclude_if=lambda value: value == "auto",
        description=(
            "How a model that thinks before it answers marks the two (vLLM's parser of this name): what it thought is never "
            "part of a row, and a schema holds for the answer alone. auto: by the model's name, openai_gptoss for gpt-oss, "
            "qwen3 for Qwen3 but its Instruct models, deepseek_r1 for DeepSeek-R1. Null: all is answer."
        ),
    )
    reasoning_tokens: int = Field(
        default=1024,
        ge=0,
        exclude_if=lambda value: value == 1024,
        description=(
            "With a reasoning parser: tokens beside an answer's own limit that the model may think with; max_model_tokens "
            "must hold prompt, thought and answer. The default is a guess; an answer cut in its thought is counted as cut."
        ),
    )
    chat_template_kwargs: dict[str, bool | int | str] = Field(
        default={},
        exclude_if=lambda value: not value,
        description="What the chat template is told besides, such as enable_thinking: false (Qwen3) or reasoning_effort: low (gpt-oss).",
    )

    @property
    def reasoning(self) -> ReasoningParser | None:
        """The parser, once ``for_model`` has decided it."""
        return None if self.reasoning_parser == "auto" else self.reasoning_parser

    def for_model(self, model: str) -> "EngineOptions":
        """The options with ``auto`` decided for a model of this name."""
        if self.reasoning_parser != "auto":
            return self
        return self.model_copy(update={"reasoning_parser": proposed_parser(model)})


class Generator(FrozenConfig):
    """One LLM of the mix: its share of the rows, its actors, its engine."""

    model: str = Field(
        default="",
        description=(
            "LLM that writes: a model folder, a Hugging Face id, a .gguf file or a registry name. With endpoint: what rows and "
            "reports call it; the server's name of the model unless you say otherwise."
        ),
    )
    endpoint: EndpointConfig | None = Field(
        default=None, exclude_if=lambda value: value is None, description=_ENDPOINT
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description=(
            "Share of the accepted rows, relative to the other generators' weights; what is refused is "
            "asked for again, so the shares hold."
        ),
    )
    pool: PoolConfig | None = Field(
        default=None,
        description=(
            "Actors of this generator and what each reserves. Null: the cluster profile's pool for synthesis."
        ),
    )
    engine: EngineOptions = Field(default=EngineOptions(), description="How vLLM runs this generator.")
    small: bool = Field(
        default=False,
        description=(
            "For models below about a billion parameters: shorter prompts, and answers bounded by patterns."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _endpoint_names_it(cls, values: Any) -> Any:
        return _named_by_endpoint(values)

    @model_validator(mode="after")
    def _has_a_model(self) -> "Generator":
        _refuse_nameless(self.model, "a generator")
        if (
            self.endpoint is not None
            and self.endpoint.budget is not None
            and self.pool is not None
            and self.pool.max_actors > 1
        ):
            raise ValueError(
                f"pool.max_actors is {self.pool.max_actors} and endpoint.budget {self.endpoint.budget:g}; allowed: 1 actor, "
                "which keeps the account, or no budget"
            )
        return self

    @model_validator(mode="after")
    def _parser_fits_the_model(self) -> "Generator":
        proposed, stated = proposed_parser(self.model), self.engine.reasoning_parser
        if proposed is None or stated in ("auto", proposed):
            return self
        if stated is None and self.engine.chat_template_kwargs.get("enable_thinking") is False:
            return self
        raise ValueError(
            f"engine.reasoning_parser is {stated}, and {self.model} marks what it thinks as {proposed}: rows would carry it; "
            f"allowed: auto, {proposed}"
            + (
                ""
                if proposed == "openai_gptoss"
                else ", or null with chat_template_kwargs: {enable_thinking: false}"
            )
        )


class Sampling(FrozenConfig):
    """How tokens are drawn; a family may say otherwise."""

    sampling_temperature: float = Field(
        default=0.7, ge=0, description="Temperature at which tokens are drawn; 0 is greedy."
    )
    top_p: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="Nucleus sampling: tokens are drawn from the most likely ones that sum to this probability.",
    )
    max_new_tokens: int = Field(default=64, ge=8, description="Longest answer, in tokens of the generator.")


class TaskConfig(FrozenConfig):
    """Step one of two: task sentences brainstormed for a family, drawn from in step two (arXiv 2511.07025 §6.2)."""

    count: int = Field(
        default=20,
        ge=1,
        description="Task sentences brainstormed per family that needs them, over all generators.",
    )
    cross_model: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description=(
            "Share of the rows whose task comes from another generator than the one that writes the row "
            "(arXiv 2511.07025 §6.2); no effect with one generator."
        ),
    )


# Settings of the section that decide how many answers are asked for, and nothing of what is in a row: an artefact made with
# others is the same, and one that is begun goes on.
ASKING = ("max_attempts_per_row", "expected_acceptance")


class SynthesisConfig(FrozenConfig):
    """Rows written by a mix of LLMs (arXiv 2511.07025 §4.3, §6.2)."""

    generators: tuple[Generator, ...] = Field(
        min_length=1, description="The LLMs that write; their weights decide the shares."
    )
    families: tuple[FamilyUnion, ...] = Field(
        min_length=1, description="What is written: one section per kind of rows."
    )
    languages: dict[str, float] = Field(
        default_factory=lambda: {"eng": 1.0},
        description="ISO 639-3 code -> weight: languages of the queries, where a family states none.",
    )
    sampling: Sampling = Field(
        default=Sampling(), description="How tokens are drawn, where a family states nothing else."
    )
    tasks: TaskConfig = Field(
        default=TaskConfig(), description="Brainstorming of task sentences, step one of two."
    )
    quality: QualityConfig = Field(
        default=QualityConfig(), description="What a row must pass before it is kept."
    )
    expected_acceptance: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Share of the answers that will likely be kept (0-1). The first round asks for that much "
            "more, so that a second round, which starts every engine again, may not be needed. Rows above "
            "the quota are not kept."
        ),
    )
    max_attempts_per_row: float = Field(
        default=4.0,
        ge=1,
        description="Answers asked for per row needed, before a generator that is always refused stops the stage.",
    )
    shard_rows: int = Field(
        default=128, ge=1, description="Answers per shard, the unit that is written exactly once and resumed."
    )

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names by which training asks for the rows; questions that stood in documents already are natural pairs."""
        return tuple(
            dict.fromkeys(
                "public" if one.family == "existing_questions" else "synthetic" for one in self.families
            )
        )

    @model_validator(mode="after")
    def _mix_is_possible(self) -> "SynthesisConfig":
        total = sum(generator.weight for generator in self.generators)
        if not total > 0:
            raise ValueError(f"generators: the weights sum to {total:g}; at least one must be above 0")
        _refuse_repeated("generators", "model", [generator.model for generator in self.generators])
        _refuse_repeated("families", "name", [family.key for family in self.families])
        for family in self.families:
            for language in family.languages or self.languages:
                family.document_weights(language)
        return self

    @field_validator("languages")
    @classmethod
    def _languages_are_known(cls, weights: dict[str, float]) -> dict[str, float]:
        check_languages(weights)
        return weights


def _refuse_repeated(section: str, what: str, names: list[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{section}: {what} {name!r} stands {times} times; give it once")
