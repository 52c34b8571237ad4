"""Section ``encoder``: the base model, its pooling, prompts and length limits."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.core.prompting import DEFAULT_INSTRUCTIONS, NEMOTRON_TEMPLATE


class EncoderConfig(FrozenConfig):
    """The backbone and its prompt contract."""

    base: str = Field(
        description=(
            "Pretrained model to train: a model folder, a Hugging Face id, a .gguf file, or a name of the "
            "registry, such as minilm-l6 (`embedloom doctor` lists them). A decoder is made bidirectional, an "
            "encoder is trained as it is."
        )
    )
    num_layers: int | None = Field(
        default=None,
        ge=1,
        description="Keep only the first N transformer layers, for small machines. Null: all.",
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description=(
            "Keep these transformer layers, counted from 0 and ascending, such as every other one of a teacher that a "
            "smaller student starts from. In place of num_layers. Null: all."
        ),
    )
    pooling: Literal["mean", "cls", "last_token"] = Field(
        default="mean",
        description=(
            "How token states become one vector: mean over all tokens (the recipe's), cls (the first "
            "token), or last_token."
        ),
    )
    normalize: bool = Field(
        default=True, description="Whether vectors have length 1, so that a dot product is a cosine."
    )
    attention: Literal["bidirectional", "causal"] = Field(
        default="bidirectional",
        description=(
            "bidirectional: every token sees all others, as the recipe does (arXiv 2511.07025 §3.1). "
            "causal: as the decoder was pretrained."
        ),
    )
    template: str = Field(
        default=NEMOTRON_TEMPLATE,
        description=(
            "How a query is written: must hold {text}, may hold {task} for the instruction. '{text}' "
            "alone for models that never saw instructions."
        ),
    )
    document_template: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description=(
            "How a document is written, for bases that learnt it so: 'passage: {text}' of the e5 family, "
            "'search_document: {text}' of Nomic's. Must hold {text}. Null: bare, as in the recipe."
        ),
    )
    instructions: dict[str, str] = Field(
        default_factory=lambda: dict(DEFAULT_INSTRUCTIONS),
        description=(
            "Task type -> instruction of queries that have none of their own; missing task types keep the "
            "defaults of llama-embed-nemotron-8b (arXiv 2511.07025 §2)."
        ),
    )
    add_bos: bool | None = Field(
        default=None,
        description=(
            "Whether texts start with the tokenizer's BOS token. Null: yes for decoders whose tokenizer "
            "has one, as the recipe does; encoders as their tokenizer does."
        ),
    )
    add_eos: bool | None = Field(
        default=None,
        description=(
            "Whether texts end with the tokenizer's EOS token. Null: no for decoders; encoders as their "
            "tokenizer does."
        ),
    )
    padding_side: Literal["left", "right"] = Field(
        default="right",
        description=(
            "Side on which shorter texts of a batch are filled up; changes no vector of this encoder, and "
            "is written into the exported tokenizer for other readers."
        ),
    )
    max_query_tokens: int = Field(
        default=512, ge=8, description="Longest query, in tokens, instruction included; longer ones are cut."
    )
    max_document_tokens: int = Field(
        default=512,
        ge=8,
        description=(
            "Longest document, in tokens; longer ones are cut. Compute grows with it; 512 is what the "
            "recipe reads (Table 8)."
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description=(
            "Number type of the computation. auto: bfloat16 where the hardware computes it fast, else "
            "float32."
        ),
    )

    @property
    def depth(self) -> int | None:
        """How many transformer layers are kept; None: all."""
        return self.num_layers if self.layers is None else len(self.layers)

    @model_validator(mode="after")
    def _layers_are_named_once(self) -> "EncoderConfig":
        if self.layers is None:
            return self
        if self.num_layers is not None:
            raise ValueError(
                f"layers is {list(self.layers)} and num_layers {self.num_layers}; allowed: one of them"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be different and ascending, found {list(self.layers)}")
        return self

    @field_validator("template")
    @classmethod
    def _template_holds_the_text(cls, value: str) -> str:
        if "{text}" not in value:
            raise ValueError("template must contain {text}; {task} is optional")
        return value

    @field_validator("document_template")
    @classmethod
    def _document_template_holds_the_text(cls, value: str | None) -> str | None:
        if value is not None and ("{text}" not in value or "{task}" in value):
            raise ValueError(f"document_template must contain {{text}} and no {{task}}, found {value!r}")
        return value

    @field_validator("instructions")
    @classmethod
    def _all_task_types(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(value) - set(DEFAULT_INSTRUCTIONS))
        if unknown:
            raise ValueError(f"unknown task type {unknown[0]!r}; allowed: {sorted(DEFAULT_INSTRUCTIONS)}")
        return {**DEFAULT_INSTRUCTIONS, **value}
