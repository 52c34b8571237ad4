"""Tiny random bases of many families, and image-and-text checkpoints with a text model inside."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from embedloom.config.encoder import EncoderConfig
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
    "Llama": {}, "GPT2": {}, "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "Qwen3": HEADS, "SmolLM3": {}, "Olmo2": {}, "Phi3": {}, "Phi": {}, "Granite": {}, "Gemma": HEADS,
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


# How the authors' checkpoints name what a class of transformers calls otherwise, as vLLM's loaders of the same list them
# (``hf_to_vllm_mapper``): Gemma 3, Ministral 3 and Mistral Small keep the layout of LLaVA, Qwen 2.5 VL that of Qwen 2.
_LLAVA = {
    "model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.", "lm_head.": "language_model.lm_head.",
}  # fmt: skip
_PREFIXES = {
    "Gemma3": _LLAVA, "Mistral3": _LLAVA, "Qwen2_5_VL": {"model.language_model.": "model.", "model.visual.": "visual."},
    "Qwen3VL": {}, "Qwen3_5": {},
}  # fmt: skip
MULTIMODAL = {
    "Gemma3": "gemma3_text", "Mistral3": "ministral3", "Qwen2_5_VL": "qwen2_5_vl_text", "Qwen3VL": "qwen3_vl_text",
    "Qwen3_5": "qwen3_5_text",
}  # fmt: skip


def _nested_config(kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` as the authors write it: what is not about sizes is as in google/gemma-3-4b-it,
    mistralai/Ministral-3-3B, Qwen/Qwen2.5-VL-3B, Qwen/Qwen3-VL-2B and Qwen/Qwen3.5-2B."""
    qwen_vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": sizes["hidden_size"],
        "patch_size": 8,
    }  # fmt: skip
    tower = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    images = {
        "image_token_id": 250,
        "video_token_id": 251,
        "vision_start_token_id": 252,
        "vision_end_token_id": 253,
    }
    if kind == "Gemma3":
        rope = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 512}
        return {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 4,
            "boi_token_index": 251, "eoi_token_index": 252, "image_token_index": 250,
            "text_config": {**sizes, **rope, "model_type": "gemma3_text"},
            "vision_config": {**tower, "model_type": "siglip_vision_model", "vision_use_head": False},
        }  # fmt: skip
    if kind == "Mistral3":
        yarn = {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        }  # fmt: skip
        return {
            "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "image_token_index": 250,
            "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "text_config": {**sizes, "model_type": "ministral3", "rope_parameters": yarn, "sliding_window": None},
            "vision_config": {**tower, "model_type": "pixtral", "head_dim": 8},
        }  # fmt: skip
    sections = [sizes["head_dim"] // 2 - 2, 1, 1]
    if kind == "Qwen2_5_VL":
        rope = {"rope_scaling": {"type": "mrope", "mrope_section": sections}, "rope_theta": 1e6}
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **images, **sizes, **rope,
            "vision_config": {**qwen_vision, "model_type": "qwen2_5_vl"},
        }  # fmt: skip
    if kind == "Qwen3VL":
        rope = {
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": sections, "rope_type": "default"}
        }
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", **images,
            "text_config": {**sizes, **rope, "model_type": "qwen3_vl_text", "rope_theta": 5e6},
            "vision_config": {**qwen_vision, "model_type": "qwen3_vl", "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        }  # fmt: skip
    rope = {
        "mrope_interleaved": True, "mrope_section": [1, 0, 0], "rope_type": "default", "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    }  # fmt: skip
    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", **images,
        "text_config": {
            **sizes, **LINEAR, "model_type": "qwen3_5_text", "rope_parameters": rope, "layer_types": layers,
            "full_attention_interval": 4, "mtp_num_hidden_layers": 1,
        },
        "vision_config": {**qwen_vision, "model_type": "qwen3_5", "deepstack_visual_indexes": [], "num_position_embeddings": 16},
    }  # fmt: skip


def multimodal(folder: Path, kind: str, **changes: Any):
    """A tiny image-and-text checkpoint as its authors ship it (nested config, their prefixes), and its text model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(_nested_config(kind, {**SIZES, **HEADS, "vocab_size": 272, **changes}))
    )
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(1)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        own = next((own for own in _PREFIXES[kind] if name.startswith(own)), "")
        weights[_PREFIXES[kind].get(own, "") + name.removeprefix(own)] = tensor.clone()
    if kind == "Qwen3_5":  # of the module that predicts tokens ahead, which nobody loads
        weights["mtp.fc.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
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
