"""Tiny random bases of many families, and image-and-text checkpoints with a text model inside."""

from pathlib import Path
from typing import Any

import torch
import transformers

from embedloom.config.model import EncoderConfig
from embedloom.encoder.export import prepare_base
from fakes import byte_tokenizer

SIZES = dict(
    vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "Llama": {}, "Qwen3": HEADS, "SmolLM3": {}, "Olmo2": {}, "Phi3": {}, "Phi": {}, "Granite": {}, "Gemma": HEADS,
    "Qwen3Moe": {**HEADS, **EXPERTS},
    # Windows of 8 tokens, where texts have up to 64:
    "Mistral": {"sliding_window": 8}, "Ministral3": {**HEADS, "sliding_window": 8}, "Gemma2": {**HEADS, "sliding_window": 8},
    "Gemma3Text": {**HEADS, "sliding_window": 8}, "Olmo3": {"sliding_window": 8}, "Cohere2": {"sliding_window": 8},
    "Exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "GptOss": {**HEADS, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


HYBRIDS = {
    "Lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "Qwen3_5Text": {**HEADS, **LINEAR},
    "Qwen3Next": {**HEADS, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
}


def make_base(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny random causal language model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def multimodal(folder: Path, kind: str):
    """A tiny image-and-text checkpoint as its authors ship it, and its text model."""
    text = {**SIZES, **HEADS}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if kind == "Gemma3":
        config = transformers.Gemma3Config(
            text_config={**text, "sliding_window": 512}, vision_config=vision, mm_tokens_per_image=4
        )
    elif kind == "Mistral3":
        config = transformers.Mistral3Config(
            text_config={**text, "model_type": "ministral3"},
            vision_config={**vision, "model_type": "pixtral", "head_dim": 8},
            image_token_index=250,
        )
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**SIZES, "rope_parameters": rope},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 8,
            },
        )
    torch.manual_seed(1)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model.model.language_model


def prepare(base: Path, out: Path, **options: Any) -> Path:
    """An embedding model folder of a base, with limits of 64 tokens."""
    out.mkdir()
    prepare_base(
        EncoderConfig(
            base=str(base), template="{text}", max_query_tokens=64, max_document_tokens=64, **options
        ),
        base,
        out,
    )
    return out
