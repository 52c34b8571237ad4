"""The files beside the weights that tell other readers how to pool, normalise and prompt.

Written in the forms that sentence-transformers 5 and 6, transformers 5, vLLM and TEI all parse: the verbose
pooling config (the compact one of sentence-transformers >= 5.4 breaks the others) and the old module paths.
"""

import json
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig

from embedloom.encoder.backbone import is_decoder
from embedloom.encoder.tokenizer import load_tokenizer, special_habits
from embedloom.errors import DataError
from embedloom.instructions import PLAIN_TEMPLATE, PromptContract
from embedloom.trained_prompts import reader_prompts

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
    if config.get("model_type") == "llama" and contract.attention == "bidirectional":
        # transformers reads is_causal, vLLM the architecture and its pooling, TEI use_bidirectional_attention.
        config |= {
            "is_causal": False,
            "use_bidirectional_attention": True,
            "architectures": ["LlamaBidirectionalModel"],
        }
        if contract.pooling == "mean":
            config["pooling"] = "avg"
    _write(path, config)


def derive_contract(folder: Path) -> PromptContract:
    """Contract of a foreign sentence-transformers folder: its pooling and length, plain template.

    Raises:
        DataError: no sentence-transformers files to derive it from.
    """
    pooling_file, length_file = folder / "1_Pooling" / "config.json", folder / "sentence_bert_config.json"
    if not pooling_file.is_file():
        raise DataError(
            f"{folder}: neither contract.json nor 1_Pooling/config.json, so how to pool is unknown; "
            "use it as encoder.base, which states the pooling, or give a sentence-transformers folder"
        )
    pooling = json.loads(pooling_file.read_text())
    mode = pooling.get("pooling_mode") or next(
        (m for m, key in _POOLING_MODES.items() if pooling.get(key)), "mean"
    )
    if mode not in ("mean", "cls", "last_token"):
        raise DataError(f"{pooling_file}: pooling {mode!r} is not supported; allowed: mean, cls, last_token")
    config = AutoConfig.from_pretrained(folder)
    limit = config.max_position_embeddings
    if length_file.is_file():
        limit = json.loads(length_file.read_text()).get("max_seq_length") or limit
    add_bos, add_eos = special_habits(load_tokenizer(folder))
    causal = is_decoder(config) and getattr(config, "is_causal", True)
    return PromptContract(
        template=PLAIN_TEMPLATE,
        add_bos=add_bos,
        add_eos=add_eos,
        max_query_tokens=limit,
        max_document_tokens=limit,
        pooling=cast(Any, mode),
        attention="causal" if causal else "bidirectional",
    )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
