"""Model folders that every reader loads: weights, tokenizer, contract, and the files that tell how to pool and prompt."""

import json
from pathlib import Path
from typing import Any

import torch

from embedloom.config.encoder import EncoderConfig
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import apply_umask
from embedloom.core.trained_prompts import reader_prompts
from embedloom.encoder.backbone import (
    check_layers,
    encoder_decoder,
    is_decoder,
    is_encoder_decoder,
    load_backbone,
    position_limit,
    read_config,
)
from embedloom.encoder.foreign import base_transformer
from embedloom.encoder.tokenizer import check_vocabulary, embedding_tokenizer, load_tokenizer, special_habits
from embedloom.errors import ConfigError, DataError

# The files beside the weights that tell other readers how to pool, normalise and prompt.
#
# Written in the forms that sentence-transformers 5 and 6, transformers 5, vLLM and TEI all parse: the verbose
# pooling config (the compact one of sentence-transformers >= 5.4 breaks the others) and the old module paths.


# Decoders that TEI makes bidirectional where their config says so; Gemma 3 has the switch in its own config class.
_FLAGGED = {"llama", "mistral", "qwen3"}
_MODULES = "sentence_transformers.models."
_POOLING_MODES = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last_token": "pooling_mode_lasttoken",
}


def write_sidecars(folder: Path, contract: PromptContract, dimension: int) -> None:
    """Write sentence-transformers files and ``contract.json``, and mark a decoder's config as bidirectional."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")] + (
        [("Normalize", "2_Normalize")] if contract.normalize else []
    )
    _write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": _MODULES + kind}
            for i, (kind, path) in enumerate(modules)
        ],
    )
    pooling: dict[str, Any] = {"word_embedding_dimension": dimension}
    pooling |= {key: mode == contract.pooling for mode, key in _POOLING_MODES.items()}
    for _, path in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
    _write(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    limit = max(contract.max_query_tokens, contract.max_document_tokens)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    _write(
        folder / "config_sentence_transformers.json",
        {
            "prompts": reader_prompts(contract),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    contract.save(folder)
    _mark_config(folder / "config.json", contract)


def _mark_config(path: Path, contract: PromptContract) -> None:
    config = json.loads(path.read_text())
    if config.get("model_type") in _FLAGGED and contract.attention == "bidirectional":
        # transformers and vLLM read is_causal, TEI use_bidirectional_attention.
        config |= {"is_causal": False, "use_bidirectional_attention": True}
    if config.get("model_type") == "llama" and contract.attention == "bidirectional":
        config["architectures"] = ["LlamaBidirectionalModel"]  # vLLM then reads the pooling here
        if contract.pooling == "mean":
            config["pooling"] = "avg"
    _write(path, config)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


SHARD_SIZE = "4GB"


def prepare_base(config: EncoderConfig, base: Path, out: Path) -> dict[str, int]:
    """Turn the configured base model into an embedding model folder, before any training.

    Args:
        config: the encoder section.
        base: resolved local folder of ``config.base``.
        out: existing folder to write into.

    Returns:
        Counts: parameters, layers, dimension.

    Raises:
        ConfigError, DataError: the base does not fit the config.
    """
    folder = base_transformer(base, config.pooling)
    if is_encoder_decoder(described := read_config(folder)):
        raise DataError(f"{folder}: {encoder_decoder(described)}")
    limit = max(config.max_query_tokens, config.max_document_tokens)
    backbone = load_backbone(folder, config.attention, torch.float32, config.num_layers, limit, config.layers)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(
        tokenizer, backbone.get_input_embeddings().num_embeddings, f"encoder.base: {config.base!r}"
    )
    decoder = is_decoder(backbone.config)
    add_bos, add_eos = _special_tokens(config, tokenizer, decoder)
    positions = position_limit(backbone.config, backbone)
    if positions is not None and limit > positions:
        key = (
            "max_query_tokens"
            if config.max_query_tokens > config.max_document_tokens
            else "max_document_tokens"
        )
        raise ConfigError(f"encoder.{key}: {limit} is above the {positions} positions of {config.base!r}")
    if decoder and config.attention == "bidirectional":
        check_layers(backbone, limit)
    if decoder:
        tokenizer = embedding_tokenizer(tokenizer, add_bos, add_eos, config.padding_side, limit)
    contract = PromptContract(
        template=config.template,
        document_template=config.document_template,
        instructions=config.instructions,
        add_bos=add_bos,
        add_eos=add_eos,
        max_query_tokens=config.max_query_tokens,
        max_document_tokens=config.max_document_tokens,
        padding_side=config.padding_side,
        pooling=config.pooling,
        normalize=config.normalize,
        attention=config.attention,
    )
    save_model(backbone.to(lossless_dtype(backbone)), tokenizer, contract, out)
    return {
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "layers": backbone.config.num_hidden_layers,
        "dimension": backbone.config.hidden_size,
    }


def lossless_dtype(model: torch.nn.Module) -> torch.dtype:
    """The narrowest type that holds every weight of a model exactly: that of the files which it was read from.

    A base of 7.5 billion bfloat16 weights is then 15 GB for every worker of every run to read, not 30.
    """
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors):
            return dtype
    return torch.float32


def _special_tokens(config: EncoderConfig, tokenizer: Any, decoder: bool) -> tuple[bool, bool]:
    # BOS where there is one (Qwen's tokenizers have none), as the paper; encoders keep their tokenizer's own habit.
    habits = (tokenizer.bos_token is not None, False) if decoder else special_habits(tokenizer)
    wanted = (
        habits[0] if config.add_bos is None else config.add_bos,
        habits[1] if config.add_eos is None else config.add_eos,
    )
    if not decoder and wanted != habits:
        raise ConfigError(
            f"encoder.add_bos/add_eos: {wanted} does not fit {config.base!r}, whose tokenizer does {habits}; leave them out"
        )
    return wanted


def save_model(backbone: Any, tokenizer: Any, contract: PromptContract, out: Path) -> None:
    """Write the weights in their dtype, the tokenizer and all sidecars into ``out``.

    Raises:
        DataError: the tokenizer, read back from its files, gives other ids.
    """
    backbone.save_pretrained(out, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(out)
    write_sidecars(out, contract, int(backbone.config.hidden_size))
    apply_umask(out)
    sample = "A sample, with Unicode: größer, 日本語."
    if load_tokenizer(out)(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
        raise DataError(f"{out}: the saved tokenizer gives other ids than the one in memory")
