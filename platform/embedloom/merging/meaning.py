"""What the files of a model folder mean, in a form in which models that compute alike are equal.

Libraries write one thing in several ways: transformers 4 ``rope_theta`` and 5 ``rope_parameters``, defaults spelt out or
left out, sentence-transformers a pooling mode by name or by six flags, and into ``tokenizer.json`` the truncation and
padding of the last call. Compared is what they come to.
"""

import json
from typing import Any

from embedloom.errors import DataError
from embedloom.instructions import CONTRACT_FILE
from embedloom.storage import Place

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
POOLING_FILE = "1_Pooling/config.json"
MODULES_FILE = "modules.json"

# Where a model was loaded from, in which type it was stored, and what only training or generating reads.
_INCIDENTAL = {
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation",
    "_attn_implementation_autoset", "_commit_hash", "_experts_implementation", "unsloth_version", "unsloth_fixed",
    "architectures", "auto_map", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "tie_word_embeddings",
    "tie_encoder_decoder", "initializer_range", "initializer_factor", "gradient_checkpointing", "pretraining_tp",
    "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
}  # fmt: skip
_TRAINING_ONLY = ("dropout", "dropout_prob", "dropout_rate", "drop", "pdrop")  # ends of keys
# A base need not be an embedding model: these are what makes one of it, or only generating reads them.
BASE_FREE = {
    "is_causal", "use_bidirectional_attention", "pooling", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "additional_special_tokens",
)  # fmt: skip
# Keys that change which ids a text becomes, through code: what they come to is tried out on texts.
HABITS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "strip_accents", "tokenize_chinese_chars",
    "split_special_tokens",
)  # fmt: skip
_POOLING_FLAGS = "pooling_mode_"
_POOLING_NAMES = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "weightedmean": "weightedmean_tokens",
}  # new name -> end of the flag


def read_json(place: Place, file: str) -> Any:
    """A JSON file of a folder.

    Raises:
        DataError: not JSON.
    """
    try:
        return json.loads(place.read_bytes(file))
    except ValueError as error:
        raise DataError(f"{place.uri}/{file}: not valid JSON: {error}") from error


def config_meaning(place: Place) -> dict[str, Any]:
    """``config.json`` with its defaults filled in by transformers, without what changes no vector.

    Raises:
        DataError: not a JSON object.
    """
    raw = read_json(place, CONFIG_FILE)
    if not isinstance(raw, dict):
        raise DataError(f"{place.uri}/{CONFIG_FILE}: expected a JSON object, found {type(raw).__name__}")
    found: dict[str, Any] = _computing(_with_defaults(raw))
    return found


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:  # custom code, which is never run: compared as it is written
        return raw
    try:
        filled: dict[str, Any] = CONFIG_MAPPING[kind].from_dict(dict(raw)).to_dict()
    except Exception:  # a value the library refuses, by a dozen types; the model itself will say so
        return raw
    return filled


def _computing(value: Any) -> Any:
    """The keys that decide what is computed, at every depth."""
    if not isinstance(value, dict):
        return value
    kept = {
        key: _computing(held)
        for key, held in value.items()
        if key not in _INCIDENTAL and not key.endswith(_TRAINING_ONLY)
    }
    if isinstance(kept.get("rope_parameters"), dict):  # "type" is the old name of "rope_type", kept beside it
        kept["rope_parameters"] = {
            key: held for key, held in kept["rope_parameters"].items() if key != "type"
        }
    return kept


def tokenizer_meaning(place: Place) -> dict[str, Any]:
    """``tokenizer.json`` as the tokenizers library writes it now, without the truncation and padding of the last call,
    which every caller sets anew.

    Raises:
        DataError: not JSON.
    """
    from tokenizers import Tokenizer

    content = read_json(place, TOKENIZER_FILE)
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception:  # the library raises plain exceptions; what it cannot read is compared as it is written
        return {key: held for key, held in content.items() if key not in ("truncation", "padding")}
    backend.no_truncation()
    backend.no_padding()
    found: dict[str, Any] = json.loads(backend.to_str())
    return {key: held for key, held in found.items() if key not in ("truncation", "padding", "version")}


def vocabulary_meaning(place: Place) -> dict[str, Any]:
    """What of a tokenizer decides which row of the embedding a piece of text becomes."""
    whole = tokenizer_meaning(place)
    return {key: whole.get(key) for key in ("model", "normalizer", "pre_tokenizer")}


def added_tokens(place: Place) -> dict[str, int]:
    """Ids of the tokens beside the vocabulary, by their text."""
    return {
        str(token["content"]): int(token["id"])
        for token in tokenizer_meaning(place).get("added_tokens") or ()
    }


def settings_meaning(place: Place) -> dict[str, Any]:
    """What the other files of a tokenizer say: special tokens, sides and the chat template, wherever they stand."""
    settings = _said(place, TOKENIZER_SETTINGS)
    tokens = {**_said(place, "special_tokens_map.json"), **settings}
    template = settings.get("chat_template")
    if place.exists("chat_template.jinja"):
        template = place.read_bytes("chat_template.jinja").decode(errors="replace")
    found = {
        "padding_side": settings.get("padding_side", "right"),
        "truncation_side": settings.get("truncation_side", "right"),
        "chat_template": template or None,
        **{name: _token(tokens.get(name)) for name in _SPECIAL_TOKENS},
    }
    return {**found, **{name: settings.get(name) for name in HABITS}}


def _token(value: Any) -> Any:
    """A special token's text, written as text or with its properties; none for an empty list."""
    if isinstance(value, dict):
        return value.get("content")
    return sorted(str(_token(one)) for one in value) or None if isinstance(value, list) else value


def modules_meaning(place: Place) -> list[list[str]]:
    """Kind and folder of every module of sentence-transformers; their classes moved between its versions."""
    modules = read_json(place, MODULES_FILE)
    return [[str(one.get("type", "")).rpartition(".")[2], str(one.get("path", ""))] for one in modules]


def pooling_meaning(place: Place) -> dict[str, Any]:
    """How token states become one vector, named or flagged."""
    content = read_json(place, POOLING_FILE)
    named = content.get("pooling_mode")
    names = [named] if isinstance(named, str) else list(named or ())
    flags = {
        key.removeprefix(_POOLING_FLAGS)
        for key, on in content.items()
        if key.startswith(_POOLING_FLAGS) and on
    }
    modes = {_POOLING_NAMES.get(name, name) for name in names} or flags
    return {"pooling_mode": sorted(modes), "include_prompt": content.get("include_prompt", True)}


def prompts_meaning(place: Place) -> dict[str, Any]:
    """Prompts and similarity of sentence-transformers; an empty prompt is none."""
    content = _said(place, PROMPTS_FILE)
    prompts = {name: text for name, text in (content.get("prompts") or {}).items() if text}
    return {
        "prompts": prompts,
        "default_prompt_name": content.get("default_prompt_name") if prompts else None,
        "similarity_fn_name": content.get("similarity_fn_name") or "cosine",
    }


def length_meaning(place: Place) -> dict[str, Any]:
    """What sentence-transformers does to a text before the tokenizer; the length it cuts at is ``longest``'s."""
    return {"do_lower_case": bool(_said(place, LENGTH_FILE).get("do_lower_case"))}


def longest(place: Place) -> int | None:
    """Tokens at which sentence-transformers cuts, from every place its versions keep them; None: a contract says it."""
    if place.exists(CONTRACT_FILE):
        return None
    stated = _said(place, LENGTH_FILE).get("max_seq_length")
    positions = read_json(place, CONFIG_FILE).get("max_position_embeddings")
    if stated is None:
        stated = _said(place, TOKENIZER_SETTINGS).get("model_max_length")
    known = [value for value in (stated, positions) if isinstance(value, int | float)]
    return int(min(known)) if known else None


def _said(place: Place, file: str) -> dict[str, Any]:
    """A file that may be left out where it says nothing but defaults."""
    found: dict[str, Any] = read_json(place, file) if place.exists(file) else {}
    return found
