"""Sections about the model: encoder and training."""

from typing import Literal

from pydantic import Field, field_validator

from embedloom.config.base import FrozenConfig
from embedloom.instructions import DEFAULT_INSTRUCTIONS, NEMOTRON_TEMPLATE


class EncoderConfig(FrozenConfig):
    """The backbone and its prompt contract."""

    base: str  # a local folder, a Hugging Face id, a .gguf file, or a name of the model registry
    num_layers: int | None = Field(default=None, ge=1)  # keep the first N decoder layers; null: all
    pooling: Literal["mean", "cls", "last_token"] = "mean"
    normalize: bool = True
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    template: str = NEMOTRON_TEMPLATE
    instructions: dict[str, str] = Field(default_factory=lambda: dict(DEFAULT_INSTRUCTIONS))
    add_bos: bool | None = (
        None  # null: BOS for decoders whose tokenizer has one (as the paper), the tokenizer's own habit for encoders
    )
    add_eos: bool | None = None  # null: no EOS for decoders, the tokenizer's own habit for encoders
    padding_side: Literal["left", "right"] = "right"
    max_query_tokens: int = Field(default=512, ge=8)
    max_document_tokens: int = Field(default=512, ge=8)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: bfloat16 where it is fast

    @field_validator("template")
    @classmethod
    def _template_holds_the_text(cls, value: str) -> str:
        if "{text}" not in value:
            raise ValueError("template must contain {text}; {task} is optional")
        return value

    @field_validator("instructions")
    @classmethod
    def _all_task_types(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(value) - set(DEFAULT_INSTRUCTIONS))
        if unknown:
            raise ValueError(f"unknown task type {unknown[0]!r}; allowed: {sorted(DEFAULT_INSTRUCTIONS)}")
        return {**DEFAULT_INSTRUCTIONS, **value}
