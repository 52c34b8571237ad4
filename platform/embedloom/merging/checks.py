"""Whether models can be merged: where they come from, and what the files of their folders mean, compared."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from embedloom.core.artefacts import MANIFEST_FILE, Artefact, fingerprint
from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import CONTRACT_FILE, PromptContract
from embedloom.core.storage import Place
from embedloom.errors import DataError, one_line
from embedloom.merging.tensors import TensorFolder

# Where a model comes from: the base it was trained from, and what identifies its files.


CARD_FILE = "README.md"
_DEPTH = 8  # training stages that may follow each other


def stated_base(place: Place, *, itself: bool = False) -> tuple[str, str] | None:
    """What a model folder says it was trained from: ("artefact", fingerprint) or ("base_model", name), or None.

    An artefact of training names its start in its manifest, and so on back to the untrained base; any other folder
    may name a base in the header of its model card.

    Args:
        place: a model folder.
        itself: it is the base, so an artefact stands for itself.
    """
    if place.exists(MANIFEST_FILE):
        manifest = place.read_json(MANIFEST_FILE)
        if itself:
            return "artefact", str(manifest.get("fingerprint"))
        return _from_manifest(place, manifest)
    named = card_header(place).get("base_model")
    if itself or not isinstance(named, str):
        return None
    return "base_model", named


def _from_manifest(place: Place, manifest: dict[str, Any]) -> tuple[str, str] | None:
    root = Place(place.uri.rstrip("/").rsplit("/", 3)[0])  # <run>/training/<candidate>/<stage>
    for _ in range(_DEPTH):
        inputs = manifest.get("inputs", {})
        if "encoder" in inputs:
            return "artefact", str(inputs["encoder"])
        before = next((name for name in inputs if name.startswith("training/")), None)
        if before is None or not root.exists(f"{before}/{MANIFEST_FILE}"):
            return None
        earlier = root.read_json(f"{before}/{MANIFEST_FILE}")
        if earlier.get("fingerprint") != inputs[before]:
            return None  # rebuilt since; what it was then is not known any more
        manifest = earlier
    return None


def card_header(place: Place) -> dict[str, Any]:
    """The YAML header of the model card; empty if there is none.

    Raises:
        DataError: a header that is not YAML.
    """
    if not place.exists(CARD_FILE):
        return {}
    parts = place.read_bytes(CARD_FILE).decode(errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise DataError(f"{place.uri}/{CARD_FILE}: its header is not YAML: {one_line(error)}") from error
    return header if isinstance(header, dict) else {}


def model_state(place: Place) -> str:
    """Fingerprint of a model folder: an artefact's own, else of what its files hold; in an object store, of their sizes
    and tags."""
    if place.exists(MANIFEST_FILE):
        return Artefact.open(place).fingerprint
    if place.is_local:
        return fingerprint(ModelFolder(place.local).contents)
    return fingerprint({name: place.state(name) for name in place.files()})


# What the files of a model folder mean, in a form in which models that compute alike are equal.
#
# Libraries write one thing in several ways: transformers 4 ``rope_theta`` and 5 ``rope_parameters``, defaults spelt out or
# left out, sentence-transformers a pooling mode by name or by six flags, and into ``tokenizer.json`` the truncation and
# padding of the last call. Compared is what they come to.


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


# Whether models can be merged: the same architecture, tokenizer, contract, base and tensors. Nothing is written.


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
        yield from _compared(CONFIG_FILE, left, right, config_meaning)
        yield from _file_differences(CONTRACT_FILE, left, right)
        yield from _tokenizer_differences(left, right)
        yield from _file_differences(MODULES_FILE, left, right, modules_meaning)
        yield from _file_differences(POOLING_FILE, left, right, pooling_meaning)
        yield from _compared(LENGTH_FILE, left, right, length_meaning)
        own = {"prompts", "default_prompt_name"} if left[1].exists(CONTRACT_FILE) else set()
        yield from _compared(PROMPTS_FILE, left, right, prompts_meaning, own)
    if base is None:
        return
    right = (BASE, base)
    yield from _compared(CONFIG_FILE, left, right, config_meaning, BASE_FREE)
    if left[1].exists(TOKENIZER_FILE) and base.exists(TOKENIZER_FILE):
        yield from _compared(TOKENIZER_FILE, left, right, vocabulary_meaning)
        ours, theirs = added_tokens(left[1]), added_tokens(base)
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
            yield from _compared(TOKENIZER_FILE, left, right, tokenizer_meaning)
    else:
        yield from _file_differences(TOKENIZER_FILE, left, right)
        yield from _vocabulary_files(left, right)
    found = list(_compared(TOKENIZER_SETTINGS, left, right, settings_meaning))
    habits = [one for one in found if one.key in HABITS]
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
    here, there = longest(left[1]), longest(right[1])
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
