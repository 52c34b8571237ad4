"""GGUF → Hugging Face folder with safetensors, tokenizer and chat template."""

import importlib.util
import os
import struct
from pathlib import Path
from typing import Any

import torch

from embedloom.core.contents import made_once
from embedloom.core.progress import note
from embedloom.errors import DataError, MissingDependency, one_line


def convert_once(gguf: Path, folder: Path) -> Path:
    """Convert unless it is there already.

    Raises:
        MissingDependency: gguf or accelerate is not installed (transformers needs both to read GGUF).
        DataError: transformers cannot read the file.
    """

    def make(out: Path) -> None:
        note("model", f"converting {gguf.name} to safetensors, once, into {folder}")
        convert(gguf, out)

    return made_once(folder, make)


def convert(gguf: Path, out: Path) -> None:
    """Write a model folder of a GGUF file: bfloat16 weights, tokenizer, chat template.

    Raises:
        MissingDependency, DataError: see ``convert_once``.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package, "demo", f"reading {gguf.name}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        quantised = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
    except (ValueError, KeyError, NotImplementedError, struct.error) as error:  # foreign, unknown, cut short
        raise DataError(f"{gguf}: transformers cannot read this GGUF file: {one_line(error)}") from error
    # transformers refuses to save a model it loaded from GGUF, so its weights move into a fresh one.
    dense = _fresh_copy(quantised).to(torch.bfloat16)
    config = dense.config
    dense.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id
    )
    dense.save_pretrained(out)
    # GGUF carries no tokenizer limit and transformers then writes 1e30.
    tokenizer.model_max_length = config.max_position_embeddings
    if _begins_texts(gguf):
        _begin_with_bos(tokenizer)
    tokenizer.save_pretrained(out)


def _begins_texts(gguf: Path) -> bool:
    """Whether the file says that every text begins with the token for that, which transformers does not read."""
    from gguf import GGUFReader

    stated = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return stated is not None and bool(stated.contents())


def _begin_with_bos(tokenizer: Any) -> None:
    """Put the first token before every text, where the tokenizer does not; Gemma writes and embeds nonsense without it."""
    from tokenizers import processors

    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a").input_ids[:1] == [bos]:
        return
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A",
        pair=f"{tokenizer.bos_token} $A {tokenizer.bos_token}:1 $B:1",
        special_tokens=[(tokenizer.bos_token, bos)],
    )


def _fresh_copy(model: Any) -> Any:
    settings = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
    }
    settings["architectures"] = [type(model).__name__]
    fresh = type(model)(type(model.config)(**settings))
    fresh.load_state_dict(model.state_dict(), strict=True)
    return fresh
