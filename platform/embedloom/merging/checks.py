"""Whether models can be merged: the same architecture, tokenizer, contract, base and tensors. Nothing is written."""

import hashlib
import json
from typing import Any

from embedloom.errors import DataError
from embedloom.instructions import CONTRACT_FILE, PromptContract
from embedloom.merging.origin import stated_base
from embedloom.merging.tensors import TensorFolder
from embedloom.storage import Place

CONFIG_FILE = "config.json"
BASE = "the base"  # how errors call the model that all others were trained from
# Where a model was loaded from and by which version says nothing about what it computes.
_INCIDENTAL = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "__version__",
    "hash",
}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
PROMPTS_FILE = "config_sentence_transformers.json"
_SIDECAR_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", PROMPTS_FILE)
# What models of one contract may have been trained with differently; the merged model's follow from all of theirs.
_PROMPTS = {
    CONTRACT_FILE: {"instructions", "document_instructions", "tasks", "default_task"},
    PROMPTS_FILE: {"prompts"},
}
# A base need not be an embedding model; what decides whether differences from it mean anything is compared.
_BASE_FREE = {"architectures", "is_causal", "use_bidirectional_attention", "pooling"}
_BASE_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model")
_OTHER_FORMATS = ("onnx", "openvino")  # copies of the backbone for other engines; they are not carried over
_SHOWN_CHARACTERS = 80


def check_mergeable(models: dict[str, Place], base: Place | None = None) -> None:
    """Compare every model with the first, and the base with it.

    Args:
        models: name -> model folder.
        base: the model that all were trained from.

    Raises:
        DataError: the first difference, with the file, the key and both values.
    """
    (first, reference), *others = models.items()
    for name, place in [*models.items(), *([(BASE, base)] if base is not None else [])]:
        if not place.exists(CONFIG_FILE):
            raise DataError(f"{place.uri}: no {CONFIG_FILE}, so model {name!r} is not a model folder")
        if place.exists(CONTRACT_FILE):
            PromptContract.parse(place.read_bytes(CONTRACT_FILE), f"{place.uri}/{CONTRACT_FILE}")
        _check_single_module(place)
    for name, place in others:
        for file in (CONFIG_FILE, CONTRACT_FILE, *_TOKENIZER_FILES, *_SIDECAR_FILES):
            own_prompts = _PROMPTS.get(file, set()) if reference.exists(CONTRACT_FILE) else set()
            _check_alike(file, (first, reference), (name, place), own_prompts)
    if base is not None:
        _check_alike(CONFIG_FILE, (first, reference), (BASE, base), _BASE_FREE)
        for file in _BASE_FILES:
            _check_alike(file, (first, reference), (BASE, base))
    _check_base(models, base)


def check_tensors(models: dict[str, TensorFolder]) -> None:
    """Same tensor names, shapes and kinds (floating or not) in every model.

    Raises:
        DataError: the first difference, named.
    """
    (first, reference), *others = models.items()
    for name, folder in others:
        for tensor in sorted(set(reference.infos) ^ set(folder.infos)):
            has, lacks = (first, name) if tensor in reference.infos else (name, first)
            raise DataError(f"merging: tensor {tensor!r} is in {has!r}, but not in {lacks!r}")
        for tensor, info in reference.infos.items():
            other = folder.infos[tensor]
            if info.shape != other.shape:
                raise DataError(
                    f"merging: tensor {tensor!r} is {list(info.shape)} in {first!r}, but {list(other.shape)} in {name!r}"
                )
            kinds = info.dtype.is_floating_point, other.dtype.is_floating_point
            if kinds[0] != kinds[1] or (not kinds[0] and info.dtype != other.dtype):
                raise DataError(
                    f"merging: tensor {tensor!r} is {info.dtype} in {first!r}, but {other.dtype} in {name!r}"
                )


def _check_base(models: dict[str, Place], base: Place | None) -> None:
    """Models that say what they were trained from must say the same."""
    stated = {name: found for name, place in models.items() if (found := stated_base(place)) is not None}
    if base is not None and (known := stated_base(base, itself=True)) is not None:
        stated = {name: found for name, found in stated.items() if found[0] == known[0]} | {BASE: known}
    for name, (kind, value) in stated.items():
        other = next(((n, v) for n, (k, v) in stated.items() if k == kind and v != value), None)
        if other is not None:
            raise DataError(
                f"merging: {name!r} was trained from {kind} {value!r}, but {other[0]!r} from {other[1]!r}; "
                "weights of different origins cannot be merged"
            )


def _check_single_module(place: Place) -> None:
    """Weights of further modules (a Dense layer) would be carried over from one model, not merged."""
    for file in place.files():
        folder, _, name = file.partition("/")
        if (
            name.endswith((".safetensors", ".bin"))
            and not folder.startswith("_")
            and folder not in _OTHER_FORMATS
        ):
            raise DataError(f"{place.uri}/{file}: weights outside the backbone cannot be merged")


def _check_alike(
    file: str, left: tuple[str, Place], right: tuple[str, Place], ignored: set[str] | None = None
) -> None:
    (first, ours), (name, theirs) = left, right
    difference = _file_difference(ours, theirs, file, ignored or set())
    if difference is not None:
        key, here, there = difference
        raise DataError(
            f"merging: {file}{f' {key}' if key else ''} is {here} in {first!r}, but {there} in {name!r}; only alike models can be merged"
        )


def _file_difference(ours: Place, theirs: Place, file: str, ignored: set[str]) -> tuple[str, str, str] | None:
    """(key, value here, value there) of the first difference, None if the files say the same."""
    here, there = ours.exists(file), theirs.exists(file)
    if not here and not there:
        return None
    if not here or not there:
        return "", "present" if here else "absent", "present" if there else "absent"
    left, right = ours.read_bytes(file), theirs.read_bytes(file)
    if left == right:
        return None
    if file.endswith(".json"):
        parsed = _parsed(ours, file, left), _parsed(theirs, file, right)
        return _value_difference(*parsed, (), _INCIDENTAL | ignored)
    return "", _shown(left), _shown(right)


def _value_difference(
    left: Any, right: Any, keys: tuple[str, ...], ignored: set[str]
) -> tuple[str, str, str] | None:
    """The first difference below ``keys``; ``ignored`` counts at the top only."""
    if left == right:
        return None
    if not isinstance(left, dict) or not isinstance(right, dict):
        return ".".join(keys), _shown(left), _shown(right)
    for key in sorted((set(left) | set(right)) - ignored):
        values = left.get(key, "absent"), right.get(key, "absent")
        found = _value_difference(*values, (*keys, key), set())
        if found is not None:
            return found
    return None


def _parsed(place: Place, file: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{place.uri}/{file}: not valid JSON: {error}") from error


def _shown(value: Any) -> str:
    """The value if it is short, else its hash."""
    text = value if isinstance(value, bytes) else ("absent" if value == "absent" else repr(value)).encode()
    if isinstance(value, bytes) or len(text) > _SHOWN_CHARACTERS:
        return f"sha256 {hashlib.sha256(text).hexdigest()[:12]}"
    return text.decode()
