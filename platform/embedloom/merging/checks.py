"""Whether models can be merged: the same architecture, tokenizer, contract, base and tensors. Nothing is written."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from embedloom.errors import DataError
from embedloom.instructions import CONTRACT_FILE, PromptContract
from embedloom.merging import meaning
from embedloom.merging.meaning import CONFIG_FILE, PROMPTS_FILE, TOKENIZER_FILE, TOKENIZER_SETTINGS, read_json
from embedloom.merging.origin import stated_base
from embedloom.merging.tensors import TensorFolder
from embedloom.storage import Place

__all__ = ["BASE", "CONFIG_FILE", "PROMPTS_FILE", "Difference", "check_mergeable", "check_tensors"]

BASE = "the base"  # how errors call the model that all others were trained from
_ORIGIN = "base"  # how a difference of origins is allowed
# Read only where there is no tokenizer.json, which holds all they do.
_VOCABULARY_FILES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
_OTHER_FORMATS = ("onnx", "openvino")  # copies of the backbone for other engines; they are not carried over
_SHOWN_CHARACTERS = 80
# What models of one contract may have been trained with differently; the merged model's follow from all of theirs.
_PROMPTS = {"instructions", "document_instructions", "tasks", "default_task"}
# Texts that tokenizers of one vocabulary cut differently where their settings do.
_PROBES = ("a", " Hello  World ", "Ünïcode ÉCOLE", "日本語のテキスト", "العربية", "<s> [CLS] </s>", "x\n\ty")
_ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which a model differs from the first."""

    file: str  # or what else it is of
    key: str  # below it, joined by dots; empty: the file itself
    here: str
    there: str
    models: tuple[str, str]

    @property
    def name(self) -> str:
        """What ``merging.allow`` calls it."""
        return f"{self.file}:{self.key}" if self.key else self.file

    def allowed_by(self, names: Sequence[str]) -> bool:
        """Whether one of the names is its own, or that of a file or key it is part of."""
        return any(self.name == name or self.name.startswith((f"{name}:", f"{name}.")) for name in names)

    def __str__(self) -> str:
        """In words."""
        what = f"{self.file}{f' {self.key}' if self.key else ''}"
        return f"{what} is {self.here} in {self.models[0]!r}, but {self.there} in {self.models[1]!r}"


def check_mergeable(
    models: dict[str, Place], base: Place | None = None, allow: Sequence[str] = ()
) -> list[Difference]:
    """Compare what every model's files mean with the first's, and the base's with it.

    Args:
        models: name -> model folder.
        base: the model that all were trained from.
        allow: names of differences that are known to change nothing.

    Returns:
        The differences that were allowed, and those that decide nothing but where texts are cut: the first model's counts.

    Raises:
        DataError: the first other difference, with the file, the key, both values and how to allow it.
    """
    (first, reference), *others = models.items()
    for name, place in [*models.items(), *([(BASE, base)] if base is not None else [])]:
        if not place.exists(CONFIG_FILE):
            raise DataError(f"{place.uri}: no {CONFIG_FILE}, so model {name!r} is not a model folder")
        if place.exists(CONTRACT_FILE):
            PromptContract.parse(place.read_bytes(CONTRACT_FILE), f"{place.uri}/{CONTRACT_FILE}")
        _check_single_module(place)
    passed = []
    for difference in _differences((first, reference), others, base):
        if not difference.allowed_by(allow):
            raise DataError(
                f"merging: {difference}; only alike models can be merged (if they are all the same: "
                f"--allow {difference.name})"
            )
        passed.append(difference)
    passed += [found for name, place in others if (found := _other_length((first, reference), (name, place)))]
    return passed + _check_base(models, base, allow)


def _differences(
    left: tuple[str, Place], others: Sequence[tuple[str, Place]], base: Place | None
) -> Iterator[Difference]:
    for right in others:
        yield from _compared(CONFIG_FILE, left, right, meaning.config_meaning)
        yield from _file_differences(CONTRACT_FILE, left, right)
        yield from _tokenizer_differences(left, right)
        yield from _file_differences(meaning.MODULES_FILE, left, right, meaning.modules_meaning)
        yield from _file_differences(meaning.POOLING_FILE, left, right, meaning.pooling_meaning)
        yield from _compared(meaning.LENGTH_FILE, left, right, meaning.length_meaning)
        own = {"prompts", "default_prompt_name"} if left[1].exists(CONTRACT_FILE) else set()
        yield from _compared(PROMPTS_FILE, left, right, meaning.prompts_meaning, own)
    if base is None:
        return
    right = (BASE, base)
    yield from _compared(CONFIG_FILE, left, right, meaning.config_meaning, meaning.BASE_FREE)
    if left[1].exists(TOKENIZER_FILE) and base.exists(TOKENIZER_FILE):
        yield from _compared(TOKENIZER_FILE, left, right, meaning.vocabulary_meaning)
        ours, theirs = meaning.added_tokens(left[1]), meaning.added_tokens(base)
        for token in sorted(ours.keys() & theirs.keys()):  # a model may have more
            yield from _value_differences(
                ours[token], theirs[token], (TOKENIZER_FILE, "added_tokens", token), left, right
            )
    else:
        yield from _vocabulary_files(left, right)


def _tokenizer_differences(left: tuple[str, Place], right: tuple[str, Place]) -> Iterator[Difference]:
    """Differences that change which ids a text becomes, or which token is special."""
    (_, ours), (_, theirs) = left, right
    if ours.exists(TOKENIZER_FILE) and theirs.exists(TOKENIZER_FILE):
        if ours.read_bytes(TOKENIZER_FILE) != theirs.read_bytes(TOKENIZER_FILE):
            yield from _compared(TOKENIZER_FILE, left, right, meaning.tokenizer_meaning)
    else:
        yield from _file_differences(TOKENIZER_FILE, left, right)
        yield from _vocabulary_files(left, right)
    found = list(_compared(TOKENIZER_SETTINGS, left, right, meaning.settings_meaning))
    habits = [one for one in found if one.key in meaning.HABITS]
    yield from (one for one in found if one not in habits)
    if habits and not _same_ids(ours, theirs):
        yield from habits


def _vocabulary_files(left: tuple[str, Place], right: tuple[str, Place]) -> Iterator[Difference]:
    for file in _VOCABULARY_FILES:
        yield from _file_differences(file, left, right)


def _same_ids(ours: Place, theirs: Place) -> bool:
    """Whether two tokenizers make the same ids of a few texts that tell their settings apart."""
    if not (ours.is_local and theirs.is_local):
        return False
    from embedloom.encoder.tokenizer import load_tokenizer

    try:
        found = [load_tokenizer(place.local)(list(_PROBES))["input_ids"] for place in (ours, theirs)]
    except DataError:
        return False
    return bool(found[0] == found[1])


def _other_length(left: tuple[str, Place], right: tuple[str, Place]) -> Difference | None:
    """Where sentence-transformers cuts: no matter of the weights, so the first model's counts, and it is said."""
    here, there = meaning.longest(left[1]), meaning.longest(right[1])
    if here == there:
        return None
    return Difference("max_seq_length", "", str(here), str(there), (left[0], right[0]))


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


def _check_base(models: dict[str, Place], base: Place | None, allow: Sequence[str]) -> list[Difference]:
    """Models that say what they were trained from must say the same."""
    stated = {name: found for name, place in models.items() if (found := stated_base(place)) is not None}
    if base is not None and (known := stated_base(base, itself=True)) is not None:
        stated = {name: found for name, found in stated.items() if found[0] == known[0]} | {BASE: known}
    passed = []
    for name, (kind, value) in stated.items():
        other = next(((n, v) for n, (k, v) in stated.items() if k == kind and v != value), None)
        if other is None:
            continue
        if _ORIGIN not in allow:
            raise DataError(
                f"merging: {name!r} was trained from {kind} {value!r}, but {other[0]!r} from {other[1]!r}; "
                f"weights of different origins cannot be merged (if it is one model: --allow {_ORIGIN})"
            )
        passed.append(Difference(_ORIGIN, "", repr(value), repr(other[1]), (name, other[0])))
    return passed[:1]


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


def _compared(
    file: str,
    left: tuple[str, Place],
    right: tuple[str, Place],
    reading: Callable[[Place], Any],
    ignored: set[str] | None = None,
) -> Iterator[Difference]:
    """Where two folders mean different things; first what is written in a file, then what follows from it."""
    ours, theirs = reading(left[1]), reading(right[1])
    if ignored:
        ours, theirs = (
            {key: value for key, value in one.items() if key not in ignored} for one in (ours, theirs)
        )
    found = list(_value_differences(ours, theirs, (file,), left, right))
    written = _top_keys(left[1], file) | _top_keys(right[1], file)
    yield from sorted(found, key=lambda one: one.key.split(".")[0] not in written)


def _top_keys(place: Place, file: str) -> set[str]:
    content = read_json(place, file) if place.exists(file) else {}
    return set(content) if isinstance(content, dict) else set()


def _file_differences(
    file: str,
    left: tuple[str, Place],
    right: tuple[str, Place],
    reading: Callable[[Place], Any] | None = None,
) -> Iterator[Difference]:
    """Differences of a file that both have, or that one of them lacks."""
    here, there = left[1].exists(file), right[1].exists(file)
    if here != there:
        words = {True: "present", False: _ABSENT}
        yield Difference(file, "", words[here], words[there], (left[0], right[0]))
    if not (here and there):
        return
    contents = left[1].read_bytes(file), right[1].read_bytes(file)
    if contents[0] == contents[1]:
        return
    if file.endswith(".json"):
        read = reading or (lambda place: read_json(place, file))
        ours, theirs = read(left[1]), read(right[1])
        if file == CONTRACT_FILE:
            ours, theirs = (
                {key: value for key, value in one.items() if key not in {"hash", *_PROMPTS}}
                for one in (ours, theirs)
            )
        yield from _value_differences(ours, theirs, (file,), left, right)
    else:
        yield Difference(file, "", _shown(contents[0]), _shown(contents[1]), (left[0], right[0]))


def _value_differences(
    ours: Any, theirs: Any, keys: tuple[str, ...], left: tuple[str, Place], right: tuple[str, Place]
) -> Iterator[Difference]:
    """Every value below ``keys`` in which the two differ; a key that one lacks is absent there."""
    if ours == theirs:
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(set(ours) | set(theirs)):
            here, there = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
            yield from _value_differences(here, there, (*keys, key), left, right)
        return
    yield Difference(keys[0], ".".join(keys[1:]), _shown(ours), _shown(theirs), (left[0], right[0]))


def _shown(value: Any) -> str:
    """The value if it is short, else its hash."""
    text = value if isinstance(value, bytes) else (_ABSENT if value == _ABSENT else repr(value)).encode()
    if isinstance(value, bytes) or len(text) > _SHOWN_CHARACTERS:
        return f"sha256 {hashlib.sha256(text).hexdigest()[:12]}"
    return text.decode()
