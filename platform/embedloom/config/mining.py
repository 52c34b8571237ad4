"""Section ``mining``: which teachers score candidates, and which candidates become hard negatives."""

import re
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from embedloom.config.base import FrozenConfig
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS

# The section of one teacher: which model scores queries and documents, and what runs it.


TeacherEngine = Literal["auto", "encoder", "sentence_transformers", "openai"]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_ENDPOINT_ONLY = ("url", "api_key_env", "max_characters", "concurrency", "timeout_seconds", "max_retries")
_LOCAL_ONLY = ("max_query_tokens", "max_document_tokens", "dtype", "trust_remote_code")


class Teacher(FrozenConfig):
    """One teacher; a plain string stands for ``{model: string}``."""

    model: str = Field(
        min_length=1,
        description=(
            "A model folder, a Hugging Face id or a registry name; with engine openai, the name of the "
            "served model."
        ),
    )
    engine: TeacherEngine = Field(
        default="auto",
        description=(
            "What computes: encoder (our own), sentence_transformers, openai (an endpoint), or auto: our "
            "own where it computes exactly what the model's files say, else sentence_transformers."
        ),
    )
    url: str | None = Field(
        default=None,
        description=(
            "engine openai, which needs it: base address up to and with /v1. Null: the model is computed "
            "here."
        ),
    )
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description=(
            "engine openai: environment variable that holds the API key; never the key itself. Null: "
            "requests carry no key."
        ),
    )
    query_template: str | None = Field(
        default=None,
        description=(
            "How a query is written: {text} once and perhaps {instruction}. Null: the model's own query "
            "prompt."
        ),
    )
    document_template: str | None = Field(
        default=None,
        description=(
            "How a document is written: {text} once and perhaps {instruction}. Null: the model's own "
            "document prompt."
        ),
    )
    max_query_tokens: int | None = Field(
        default=None,
        ge=8,
        description="Longest query, in tokens; longer ones are cut. Null: mining.max_query_tokens.",
    )
    max_document_tokens: int | None = Field(
        default=None,
        ge=8,
        description="Longest document, in tokens; longer ones are cut. Null: mining.max_document_tokens.",
    )
    max_characters: int | None = Field(
        default=None,
        ge=1,
        description=(
            "engine openai: characters to which longer texts are cut before they are sent. Null: sent whole."
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description=(
            "Number type of the computation. auto: bfloat16 where the hardware computes it fast, else "
            "float32."
        ),
    )
    batch_size: int = Field(
        default=32, ge=1, le=2048, description="Texts per batch or request; 2,048 is OpenAI's limit."
    )
    concurrency: int = Field(
        default=4, ge=1, le=256, description="engine openai: requests in flight per actor."
    )
    timeout_seconds: float = Field(
        default=60.0, gt=0, description="engine openai: seconds that a request may take."
    )
    max_retries: int = Field(
        default=5,
        ge=0,
        description="engine openai: repetitions after status 408, 409, 429, 5xx or a broken connection.",
    )
    trust_remote_code: bool = Field(
        default=False,
        exclude_if=lambda value: value is False,
        description=(
            "Run code that lies beside the model's weights (auto_map, module classes). Only for models whose "
            "authors you trust."
        ),
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Either a name or a section, as ``_string_is_the_model`` reads it."""
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(schema)]}

    @model_validator(mode="before")
    @classmethod
    def _string_is_the_model(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("query_template", "document_template")
    @classmethod
    def _template_holds_the_text(cls, value: str | None) -> str | None:
        return value if value is None else check_template(value)

    @field_validator("url")
    @classmethod
    def _url_is_a_base(cls, value: str | None) -> str | None:
        if value is None:
            return value
        if not re.match(r"https?://[^/@\s]+(/|$)", value):
            raise ValueError(
                "url must be http(s)://host[:port][/path]; a key goes into api_key_env, not here"
            )
        if value.rstrip("/").endswith("/embeddings"):
            raise ValueError("url is the base address, such as http://host:8000/v1, without /embeddings")
        return value

    @model_validator(mode="after")
    def _keys_fit_the_engine(self) -> "Teacher":
        # Against the defaults rather than by model_fields_set, so that a dumped config can be read back.
        defaults = {key: info.default for key, info in type(self).model_fields.items()}
        given = {key for key, default in defaults.items() if getattr(self, key) != default}
        if self.engine == "openai":
            if self.url is None:
                raise ValueError("engine openai needs url, the base address of the endpoint")
            _refuse(
                given, _LOCAL_ONLY, "engine openai; the endpoint decides, cut long texts by max_characters"
            )
            return self
        _refuse(given, _ENDPOINT_ONLY, f"engine {self.engine}; only engine openai takes it")
        if self.engine == "encoder":
            reason = "engine encoder; its template stands in the model's contract.json"
            _refuse(given, ("query_template", "document_template", "batch_size"), reason)
        return self


def check_template(value: str) -> str:
    """Return a template that holds the text once.

    Raises:
        ValueError: it does not, or holds another name in braces.
    """
    names = _PLACEHOLDER.findall(value)
    if names.count("text") != 1 or set(names) - {"text", "instruction"}:
        raise ValueError("a template holds {text} once and may hold {instruction}; nothing else in braces")
    return value


def _refuse(given: set[str], keys: tuple[str, ...], reason: str) -> None:
    wrong = [key for key in keys if key in given]
    if wrong:
        raise ValueError(f"{wrong[0]} does not fit {reason}")


class SelectionConfig(FrozenConfig):
    """Which candidates become negatives; changing it builds the examples again, without mining again.

    Methods and best settings: NV-Retriever (arXiv 2407.15831, §3 and §4.3). Scores are the teacher's.
    """

    method: Literal["perc_pos", "margin_pos", "abs", "shift", "naive"] = Field(
        default="perc_pos",
        description=(
            "Rule that keeps likely right answers out of the negatives (NV-Retriever, arXiv 2407.15831 "
            "§3): perc_pos, score below margin_ratio x the positive's; margin_pos, below the positive's "
            "score - margin; abs, below max_score; shift, without the best candidates; naive, the best "
            "candidates whatever they score."
        ),
    )
    negatives: int = Field(
        default=4,
        ge=1,
        description=(
            "Negatives wanted per example. Training stages cannot use more; 4 is what the recipe's second "
            "stage uses (arXiv 2511.07025 Table 8)."
        ),
    )
    min_negatives: int = Field(
        default=1, ge=1, description="An example with fewer negatives is a counted reject."
    )
    margin_ratio: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description=(
            "perc_pos: a negative's score must stay below this share of the positive's score. 0.95 is the "
            "best setting of arXiv 2407.15831 §4.3; lower is safer and easier, 1 keeps whatever scores "
            "below the positive."
        ),
    )
    margin: float = Field(
        default=0.05,
        ge=0,
        description=(
            "margin_pos: how far below the positive's score a negative's must stay, in units of the "
            "teacher's score. 0.05 is the best setting of arXiv 2407.15831 §4.3."
        ),
    )
    max_score: float = Field(default=0.7, description="abs: the score that a negative must stay below.")
    shift: int = Field(
        default=10, ge=0, description="shift: how many of the best candidates are passed over."
    )
    min_score: float | None = Field(
        default=None,
        description="Any method: candidates that score lower are too easy and passed over. Null: none is.",
    )
    sample_from: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Negatives are drawn from this many best candidates that the rule leaves, by a softmax of "
            "their scores. Null: the best are taken."
        ),
    )
    sample_temperature: float = Field(
        default=0.05,
        gt=0,
        description=(
            "Temperature of that softmax; lower prefers the best more strongly. In units of the teacher's "
            "score."
        ),
    )
    keep_best: bool = Field(
        default=False,
        description="With sample_from: the best remaining candidate is always taken, only the others are drawn.",
    )
    blend: Literal["first", "cross_sample", "intra_sample", "intra_sample_duplicates"] = Field(
        default="first",
        description=(
            "With several teachers (arXiv 2407.15831 §4.4): first, the first teacher's negatives; "
            "cross_sample, one teacher's, drawn per query; intra_sample, the next best of each teacher in "
            "turn, every document once; intra_sample_duplicates, the same but a document may stand as "
            "often as teachers chose it."
        ),
    )

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

    model: str = Field(
        min_length=1, description="Cross-encoder: a model folder or Hugging Face id with one label."
    )
    top: int = Field(
        default=50,
        ge=1,
        description="Candidates scored again per query: each teacher's best in turn. Cost grows in proportion.",
    )
    max_tokens: int = Field(
        default=512,
        ge=8,
        description="Longest query and document together, in tokens of the cross-encoder; longer pairs are cut.",
    )
    query_template: str = Field(
        default="{text}",
        description=(
            "How a query is written for the cross-encoder: {text} once and perhaps {instruction}. "
            "Documents are read as they are."
        ),
    )
    batch_size: int = Field(default=32, ge=1, description="Pairs per forward pass.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description=(
            "Number type of the computation. auto: bfloat16 where the hardware computes it fast, else "
            "float32."
        ),
    )
    trust_remote_code: bool = Field(
        default=False,
        exclude_if=lambda value: value is False,
        description=(
            "Run code that lies beside the model's weights (auto_map, module classes). Only for models whose "
            "authors you trust."
        ),
    )

    @field_validator("query_template")
    @classmethod
    def _template_holds_the_text(cls, value: str) -> str:
        return check_template(value)


class AuditConfig(FrozenConfig):
    """A second opinion on the selected negatives."""

    judge: Teacher | None = Field(
        default=None,
        description=(
            "Second teacher that looks at the selected negatives and estimates how many are right "
            "answers. Null: no audit by a second teacher."
        ),
    )
    sample: int = Field(
        default=300,
        ge=10,
        description=(
            "Queries looked at; of each, the first negative with and without the rule. 300 give an "
            "interval of about +-5 points."
        ),
    )


class MiningConfig(FrozenConfig):
    """Candidates by teachers, positive-aware hard negatives among them."""

    teachers: tuple[Teacher, ...] = Field(
        min_length=1,
        description=(
            "Embedding models that score documents for every query. A plain string stands for {model: "
            "STRING}."
        ),
    )
    top_k: int = Field(
        default=50,
        ge=1,
        le=2048,
        description=(
            "Candidates kept per query and teacher, best first, all with their scores. Must be above "
            "selection.negatives; more leaves the rule more to choose from where near-copies fill the "
            "first ranks."
        ),
    )
    max_query_tokens: int = Field(
        default=64,
        ge=8,
        description=(
            "Longest query that a teacher reads, in its tokens; longer ones are cut. A teacher may state "
            "its own."
        ),
    )
    max_document_tokens: int = Field(
        default=256,
        ge=8,
        description=(
            "Longest document that a teacher reads, in its tokens; longer ones are cut. A teacher may "
            "state its own."
        ),
    )
    shard_rows: int = Field(
        default=2048,
        ge=1,
        description="Texts per shard, the unit that is embedded, written and resumed as one.",
    )
    memory_gib: float = Field(
        default=4.0,
        gt=0,
        description=(
            "Document vectors that one search actor keeps in memory, in GiB; the rest streams from disk "
            "at each pass. Changes speed only."
        ),
    )
    instructions: dict[str, str] = Field(
        default_factory=lambda: dict(DEFAULT_INSTRUCTIONS),
        description=(
            "Task type -> instruction that teachers get before queries which have none of their own. "
            "Defaults: those of llama-embed-nemotron-8b (arXiv 2511.07025 §2)."
        ),
    )
    rescoring: RescoringConfig | None = Field(
        default=None,
        description=(
            "Cross-encoder that scores the best candidates again. Null: the rule reads the teachers' scores."
        ),
    )
    selection: SelectionConfig = Field(
        default=SelectionConfig(),
        description="Which candidates become negatives. Changing it rebuilds the examples without mining again.",
    )
    audit: AuditConfig = Field(
        default=AuditConfig(), description="Second opinion on the selected negatives, in the report."
    )

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
