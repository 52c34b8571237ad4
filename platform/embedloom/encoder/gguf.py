"""GGUF → Hugging Face folder with safetensors, tokenizer and chat template."""

import importlib.util
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch

from embedloom.core.progress import note
from embedloom.core.storage import apply_umask
from embedloom.errors import DataError, MissingDependency, one_line

_DONE = ".converted"  # written last; a folder without it is an interrupted conversion


def convert_once(gguf: Path, folder: Path) -> Path:
    """Convert unless it is there already; written beside and renamed, so two processes cannot mix files.

    Raises:
        MissingDependency: gguf or accelerate is not installed (transformers needs both to read GGUF).
        DataError: transformers cannot read the file.
    """
    if (folder / _DONE).is_file():
        return folder
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package, "demo", f"reading {gguf.name}")
    note("model", f"converting {gguf.name} to safetensors, once, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, temporary)
        (temporary / _DONE).touch()
        apply_umask(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process finished first, or an interrupted folder stands in the way.
            if not (folder / _DONE).is_file():
                shutil.rmtree(folder)
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(gguf: Path, out: Path) -> None:
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
    tokenizer.save_pretrained(out)


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
