"""The files beside the weights that tell other readers how to pool, normalise and prompt.

Written in the forms that sentence-transformers 5 and 6, transformers 5, vLLM and TEI all parse: the verbose
pooling config (the compact one of sentence-transformers >= 5.4 breaks the others) and the old module paths.
"""

import json
from pathlib import Path
from typing import Any

from embedloom.instructions import PromptContract
from embedloom.trained_prompts import reader_prompts

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
