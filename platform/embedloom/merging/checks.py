"""Whether models can be averaged: the same architecture, tokenizer, prompts and tensors. Nothing is written."""

import hashlib
import json
from pathlib import Path
from typing import Any

from embedloom.errors import DataError
from embedloom.instructions import CONTRACT_FILE, PromptContract
from embedloom.merging.tensors import TensorFolder

CONFIG_FILE = "config.json"
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
_SIDECAR_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
_SHOWN_CHARACTERS = 80


def check_mergeable(models: dict[str, Path]) -> None:
    """Compare every model with the first.

    Args:
        models: name → model folder.

    Raises:
        DataError: the first difference, with the file, the key and both values.
    """
    (first, base), *others = models.items()
    for name, folder in models.items():
        if not (folder / CONFIG_FILE).is_file():
            raise DataError(f"{folder}: no {CONFIG_FILE}, so model {name!r} is not a model folder")
        if (folder / CONTRACT_FILE).is_file():
            PromptContract.load(folder)
        _check_single_module(folder)
    for name, folder in others:
        for file in (CONFIG_FILE, CONTRACT_FILE, *_TOKENIZER_FILES, *_SIDECAR_FILES):
            difference = _file_difference(base / file, folder / file)
            if difference is not None:
                key, ours, theirs = difference
                raise DataError(
                    f"merging: {file}{f' {key}' if key else ''} is {ours} in {first!r}, but {theirs} in {name!r}; only alike models can be averaged"
                )


def check_tensors(models: dict[str, TensorFolder]) -> None:
    """Same tensor names, shapes and kinds (floating or not) in every model.

    Raises:
        DataError: the first difference, named.
    """
    (first, base), *others = models.items()
    for name, folder in others:
        for tensor in sorted(set(base.infos) ^ set(folder.infos)):
            has, lacks = (first, name) if tensor in base.infos else (name, first)
            raise DataError(f"merging: tensor {tensor!r} is in {has!r}, but not in {lacks!r}")
        for tensor, info in base.infos.items():
            other = folder.infos[tensor]
            if info.shape != other.shape:
                raise DataError(
                    f"merging: tensor {tensor!r} is {list(info.shape)} in {first!r}, but {list(other.shape)} in {name!r}"
                )
            if info.dtype.is_floating_point != other.dtype.is_floating_point:
                raise DataError(
                    f"merging: tensor {tensor!r} is {info.dtype} in {first!r}, but {other.dtype} in {name!r}"
                )


def _check_single_module(folder: Path) -> None:
    """Weights of further modules (a Dense layer) would be carried over from one model, not averaged."""
    for pattern in ("*/*.safetensors", "*/*.bin"):
        for file in sorted(folder.glob(pattern)):
            if not file.parent.name.startswith(("_", ".")):
                raise DataError(f"{file}: weights outside the backbone cannot be merged")


def _file_difference(ours: Path, theirs: Path) -> tuple[str, str, str] | None:
    """(key, value here, value there) of the first difference, None if the files say the same."""
    if not ours.is_file() and not theirs.is_file():
        return None
    if not ours.is_file() or not theirs.is_file():
        return ("", *("present" if path.is_file() else "absent" for path in (ours, theirs)))  # type: ignore[return-value]
    left, right = ours.read_bytes(), theirs.read_bytes()
    if left == right:
        return None
    if ours.suffix == ".json":
        return _json_difference(_parsed(ours, left), _parsed(theirs, right))
    return "", _shown(left), _shown(right)


def _json_difference(left: Any, right: Any) -> tuple[str, str, str] | None:
    if not isinstance(left, dict) or not isinstance(right, dict):
        return None if left == right else ("", _shown(left), _shown(right))
    for key in sorted((set(left) | set(right)) - _INCIDENTAL):
        if key not in left or key not in right or left[key] != right[key]:
            return key, _shown(left.get(key, "absent")), _shown(right.get(key, "absent"))
    return None


def _parsed(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error


def _shown(value: Any) -> str:
    """The value if it is short, else its hash."""
    text = value if isinstance(value, bytes) else repr(value).encode()
    if isinstance(value, bytes) or len(text) > _SHOWN_CHARACTERS:
        return f"sha256 {hashlib.sha256(text).hexdigest()[:12]}"
    return text.decode()
