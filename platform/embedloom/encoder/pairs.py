"""A reranker: a model that reads a query and a document at once and gives one logit, in unpadded batches as the encoder has
them; how pairs become tokens, and the folder that sentence-transformers, transformers and vLLM read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from embedloom.core.prompting import PromptContract
from embedloom.core.storage import apply_umask
from embedloom.encoder.backbone import (
    DTypeName,
    attention_kernel,
    cast_for_inference,
    has_fast_linear,
    is_decoder,
    is_encoder_decoder,
    pick_device,
    pick_dtype,
    position_limit,
    read_config,
)
from embedloom.encoder.cpu_layers import fuse, quantize_linears
from embedloom.encoder.export import SHARD_SIZE, lossless_dtype
from embedloom.encoder.feeding import send
from embedloom.encoder.foreign import token_limit
from embedloom.encoder.model import DEFAULT_BATCH_TOKENS, Encoder, Vectors
from embedloom.encoder.registry import NodeModel, local_folder, open_model
from embedloom.encoder.tokenizer import CutsByText, CutTexts, check_vocabulary, load_tokenizer, truncated_ids
from embedloom.errors import ConfigError, DataError

# How two texts become the tokens of a pair.
#
# Tokens travel as plain numbers through everything that batches texts by their length, so that a token of the second text
# says so itself: its id plus 2^30, which no vocabulary reaches.


_SECOND = 1 << 30


def types_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids, and 0 or 1 by the text that each token is of; int64 in and out, of the same shape."""
    return tokens & (_SECOND - 1), tokens >> 30


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """The special tokens around a text, and around and between two, as a tokenizer puts them; those of a pair with their text."""

    before_one: tuple[int, ...]
    after_one: tuple[int, ...]
    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    second: int  # what is added to a token of the second text; 0 where the model has one type of tokens
    max_tokens: int  # of a pair, special tokens included

    @classmethod
    def of(cls, tokenizer: Any, max_tokens: int, has_types: bool) -> "PairTemplate":
        """Read the template off what the tokenizer makes of two letters.

        Args:
            tokenizer: a fast one.
            max_tokens: of a pair.
            has_types: whether the model tells the texts apart by token types.

        Raises:
            DataError: the tokenizer has no such template.
        """
        one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
        alone = tokenizer("a")["input_ids"]
        pair = tokenizer("a", "b", return_token_type_ids=True)
        ids = pair["input_ids"]
        types = pair["token_type_ids"] if has_types else [0] * len(ids)
        try:
            at, first = _find(one, alone, 0), _find(one, ids, 0)
            last = _find(other, ids, first + len(one))
        except ValueError as error:
            raise DataError(f"the tokenizer makes {ids} of the pair ('a', 'b'): no texts in it") from error
        marked = [token + _SECOND * kind for token, kind in zip(ids, types, strict=True)]
        if len(set(types[first : first + len(one)])) > 1 or types[first]:
            raise DataError(f"the tokenizer gives the first text of a pair the types {types}; allowed: 0")
        return cls(
            tuple(alone[:at]),
            tuple(alone[at + len(one) :]),
            tuple(marked[:first]),
            tuple(marked[first + len(one) : last]),
            tuple(marked[last + len(other) :]),
            _SECOND * types[last],
            max_tokens,
        )

    @property
    def room(self) -> int:
        """Tokens of a pair that are left for its texts."""
        return self.max_tokens - len(self.before) - len(self.between) - len(self.after)

    def bare(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a text without the special ones that stand around it alone."""
        stop = len(ids) - len(self.after_one)
        return list(ids[len(self.before_one) : stop])

    def lengths(self, query: int, document: int) -> tuple[int, int]:
        """Tokens of either text that a pair has, where they are cut: the longer one first, as tokenizers' longest_first.

        >>> PairTemplate((), (), (1,), (2,), (2,), 0, 13).lengths(3, 20)
        (3, 7)
        >>> PairTemplate((), (), (1,), (2,), (2,), 0, 14).lengths(20, 9)
        (6, 5)
        """
        short, long = min(query, document), max(query, document)
        if short + long > self.room:
            long = short if short > self.room else max(short, self.room - short)
            if short + long > self.room:
                short, long = self.room // 2, self.room // 2 + self.room % 2
        return (short, long) if query <= document else (long, short)

    def pair(
        self, query: Sequence[int], document: Sequence[int], behind: tuple[int, int] = (0, 0)
    ) -> list[int]:
        """The tokens of a pair of bare texts, cut to ``max_tokens``.

        Args:
            query: of which no more than ``room`` tokens matter.
            document: likewise.
            behind: tokens that were cut off either already; of two long texts the longer one has an odd token.
        """
        first, last = self.lengths(len(query) + behind[0], len(document) + behind[1])
        second = self.second
        return [
            *self.before,
            *query[:first],
            *self.between,
            *(token + second for token in document[:last]),
            *self.after,
        ]

    def length(self, query: int, document: int) -> int:
        """Tokens of a pair, by the lengths of its texts as each stands alone, special tokens included."""
        around = len(self.before_one) + len(self.after_one)
        return sum(self.lengths(query - around, document - around)) + self.max_tokens - self.room


def has_types(config: Any, tokenizer: Any) -> bool:
    """Whether a model is told of which text a token is: it has types, and its tokenizer's files say that it is given them."""
    return getattr(config, "type_vocab_size", 1) > 1 and "token_type_ids" in tokenizer.model_input_names


def _find(part: list[int], whole: list[int], start: int) -> int:
    for at in range(start, len(whole) - len(part) + 1):
        if whole[at : at + len(part)] == part:
            return at
    raise ValueError(part)


# The model: a backbone and its head of one label.


RERANKER_FILE = "reranker.json"
_VERSION = 1
_FEWEST_TOKENS = 16  # of a pair; fewer leave nothing to compare
_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 0.1  # of logits in float32, and in bfloat16 or int8
_ACTIVATION = "torch.nn.modules.activation.Sigmoid"


def pair_contract(max_tokens: int) -> PromptContract:
    """How a reranker wants its texts: bare, and none longer than a pair may be."""
    return PromptContract(
        template="{text}",
        max_query_tokens=max_tokens,
        max_document_tokens=max_tokens,
        pooling="cls",
        normalize=False,
    )


class PairHead(nn.Module):
    """What a sequence classifier of transformers makes of the state of a text's first token: float32 [b, d] to [b, 1]."""

    dimension = 1

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = [model]  # whose parameters these are, and not a second owner's

    def forward(self, states: Tensor) -> Tensor:
        """Logits [b, 1], float32.

        A model with a pooler has dropout and a linear layer behind it (BERT); others a head that takes all states and
        looks at the first (RoBERTa, XLM-R).
        """
        (model,) = self._model
        first = states.to(_dtype_of(model.classifier)).unsqueeze(1)
        with torch.autocast(states.device.type, enabled=False):
            pooler = getattr(model.base_model, "pooler", None)
            if pooler is None:
                logits = model.classifier(first)
            else:
                logits = model.classifier(model.dropout(pooler(first)))
        return logits.float()


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class PairEncoder(Encoder):
    """A sequence classifier with one label; its "vectors" are logits [pairs, 1], of pairs as ``tokenize_pairs`` makes them."""

    def __init__(
        self, model: Any, tokenizer: Any, dtype: torch.dtype, max_tokens: int, coarse: bool = False
    ) -> None:
        """Build one.

        Args:
            model: ``...ForSequenceClassification``.
            tokenizer: its fast tokenizer.
            dtype: compute type.
            max_tokens: of a pair.
            coarse: whether layers are 8-bit, so that two ways through the model differ by more than float noise.
        """
        super().__init__(model.base_model, tokenizer, pair_contract(max_tokens), dtype)
        self.model = model
        self.head = PairHead(model)
        self._has_types = has_types(model.config, tokenizer)
        self.pairs = PairTemplate.of(tokenizer, max_tokens, self._has_types)
        self._by_parts = True
        self._by_parts = self._agrees(coarse or dtype != torch.float32)
        if not self._by_parts:
            self.packed, self._fused = False, None
            model.base_model.set_attn_implementation(attention_kernel(model.config))

    @classmethod
    def open(
        cls,
        folder: Path | NodeModel,
        *,
        threads: int | None = None,
        dtype: DTypeName = "auto",
        device: str = "auto",
        trainable: bool = False,
    ) -> "PairEncoder":
        """Load a reranker: one of ours, or a cross-encoder that others made.

        Arguments as of ``Encoder.load``.

        Raises:
            DataError: no sequence classifier, one with several labels, or one that was a decoder.
            ConfigError: int8 on a device or for training, or on a CPU without its kernel.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        target = pick_device(device)
        if dtype == "int8" and (target.type != "cpu" or trainable):
            raise ConfigError("compute_dtype: 'int8' is for inference on CPU, with weights of its own")
        root = local_folder(folder)
        check_reranker(root)
        compute = pick_dtype(dtype, target)
        stored = compute if target.type == "cuda" else torch.float32
        model, tokenizer = _classifier(root, stored).to(target).eval(), load_tokenizer(root)
        if target.type == "cpu" and not trainable and has_fast_linear(compute):
            _cast(model, compute)
        encoder = cls(model, tokenizer, compute, pair_tokens(root, tokenizer))
        if dtype == "int8":
            quantize_linears(model.base_model)
            encoder._fused = fuse(model.base_model) if encoder.packed else None
        return encoder

    def tokenize_pairs(
        self, queries: Sequence[str], documents: Sequence[str], cuts: CutTexts | None = None
    ) -> tuple[list[list[int]], list[bool]]:
        """Tokens of each pair, and whether either of its texts was cut; a text that comes again is tokenized once.

        Args:
            queries: one a pair.
            documents: one a pair.
            cuts: takes note of what a pair leaves out of its texts, counted by pair; None: ``self.cuts`` does.
        """
        texts = list(dict.fromkeys([*queries, *documents]))
        own = CutsByText()
        # One text alone may be as long as a pair, so what a pair leaves of it is decided here.
        limit = self.pairs.max_tokens + len(self.pairs.before_one) + len(self.pairs.after_one)
        found = truncated_ids(self.tokenizer, texts, limit, own)
        known = {
            text: (self.pairs.bare(ids), left)
            for text, ids, left in zip(texts, found, own.by_text, strict=True)
        }
        ids, read, left_out = [], [], []
        for query, document in zip(queries, documents, strict=True):
            (one, left), (other, behind) = known[query], known[document]
            ids.append(self.pairs.pair(one, other, (left, behind)))
            read.append(len(ids[-1]))
            whole = len(one) + left + len(other) + behind
            left_out.append(whole - sum(self.pairs.lengths(len(one) + left, len(other) + behind)))
        (self.cuts if cuts is None else cuts).count(read, left_out)
        return ids, [bool(left) for left in left_out]

    def score(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        max_batch_tokens: int | None = DEFAULT_BATCH_TOKENS,
    ) -> Vectors:
        """Logits of pairs: float32 [len(queries)]; above 0 where the document answers, for a model trained so.

        Raises:
            DataError: a logit that is not finite, or a pair that does not fit into memory.
        """
        ids, _ = self.tokenize_pairs(queries, documents)
        logits: Vectors = self.embed_tokens(ids, max_batch_tokens)[:, 0]
        return logits

    def forward(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits of one batch of pairs, with gradients if enabled: float32 [len(token_ids), 1]."""
        if self._by_parts:
            return super().forward(token_ids)
        lengths = [len(ids) for ids in token_ids]
        self.tokens.add(lengths)
        return self._whole(token_ids)

    def _whole(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """As transformers computes it, padded."""
        ids, mask = self._pad(token_ids, [len(own) for own in token_ids])
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits: Tensor = self.model(**self._inputs(ids), attention_mask=mask).logits
        return logits.float()

    def _inputs(self, token_ids: Tensor) -> dict[str, Tensor]:
        ids, types = types_of(token_ids)
        found = {"input_ids": send(ids, self.device)}
        return found | ({"token_type_ids": send(types, self.device)} if self._has_types else {})

    @torch.no_grad()
    def _agrees(self, coarse: bool) -> bool:
        """Whether backbone and head one after the other give the logits of the whole model."""
        size = self.model.config.vocab_size
        texts = [[5, 6, 7, 8, 9], [8, 7, 6, 5], [6]]
        pairs = [self.pairs.pair([t % size for t in text], [(t + 3) % size for t in text]) for text in texts]
        training = self.model.training
        self.model.eval()
        before, attention = (self.tokens.real, self.tokens.padded), self.model.config._attn_implementation
        try:
            own = super().forward(pairs)
        except (AttributeError, TypeError, RuntimeError, IndexError):  # another kind of head
            return False
        finally:
            self.tokens.real, self.tokens.padded = before
            self.model.base_model.set_attn_implementation(attention_kernel(self.model.config))
            whole = self._whole(pairs)
            self.model.base_model.set_attn_implementation(attention)
            self.model.train(training)
        limit = _COARSE_TOLERANCE if coarse else _TOLERANCE
        return bool((own - whole).abs().max() <= limit * max(1.0, float(whole.abs().max())))


def _classifier(folder: Path, dtype: torch.dtype, **changes: Any) -> Any:
    config = read_config(folder)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention_kernel(config), trust_remote_code=False, **changes
    )


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Lay out the backbone's linear layers for inference; what is behind them is one state a pair, and stays float32."""
    backbone = model.base_model
    pooler = getattr(backbone, "pooler", None)
    if pooler is not None:
        backbone.pooler = None
    cast_for_inference(backbone, dtype)
    if pooler is not None:
        backbone.pooler = pooler
    model.requires_grad_(False)


def check_reranker(folder: Path) -> None:
    """Return where a folder holds a reranker that ``PairEncoder`` computes.

    Raises:
        DataError: it does not; the message says what it holds and what is allowed.
    """
    config = read_config(folder)
    names = list(getattr(config, "architectures", None) or [])
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise DataError(
            f"{folder}: no reranker, its config.json has architectures {names}; allowed: a ...ForSequenceClassification with "
            "one label, such as a run with a reranker section makes, or a cross-encoder of sentence-transformers"
        )
    if config.num_labels != 1:
        raise DataError(
            f"{folder}: this cross-encoder has {config.num_labels} labels; allowed: 1, the relevance"
        )
    _check_encoder(config, str(folder))


def _check_encoder(config: Any, where: str) -> None:
    if is_decoder(config) or is_encoder_decoder(config):
        raise DataError(
            f"{where}: model_type {config.model_type!r} is no encoder; allowed: encoders such as BERT, XLM-R and ModernBERT"
        )


def pair_tokens(folder: Path, tokenizer: Any) -> int:
    """Most tokens of a pair: what ``reranker.json`` says, else the least of what the folder's files say."""
    path = folder / RERANKER_FILE
    if not path.is_file():
        return token_limit(folder, read_config(folder), tokenizer)
    try:
        content = json.loads(path.read_text())
        version, found = content["version"], content["max_tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not readable: {error!r}") from error
    if version != _VERSION or not isinstance(found, int):
        raise DataError(f"{path}: version {version!r}, this version reads {_VERSION}")
    return found


# Folders: a base with a fresh head before any training, and the trained model.


def prepare_reranker(
    base: Path, max_tokens: int, seed: int, out: Path, where: str = "reranker.base"
) -> dict[str, int]:
    """Give a base a head of one label, drawn by a seed; of a cross-encoder with one label the head is kept.

    Args:
        base: resolved folder of an encoder.
        max_tokens: of a pair.
        seed: of the head's weights.
        out: existing folder to write into, ``contract.json`` included, by which training data is prepared.
        where: the config key, named in errors.

    Returns:
        Counts: parameters, layers.

    Raises:
        ConfigError: more tokens than the base has positions.
        DataError: no encoder, or a tokenizer that does not fit it.
    """
    folder = open_model(base).transformer
    config = read_config(folder)
    _check_encoder(config, f"{where}: {base.name}")
    positions = position_limit(config)
    if positions is not None and max_tokens > positions:
        raise ConfigError(
            f"{where.rpartition('.')[0]}.max_tokens: {max_tokens} is above the {positions} positions of {base.name!r}; "
            f"allowed: {_FEWEST_TOKENS} to {positions}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _classifier(folder, torch.float32, num_labels=1)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, where)
    PairTemplate.of(tokenizer, max_tokens, has_types(config, tokenizer))
    save_reranker(model.to(lossless_dtype(model)), tokenizer, max_tokens, out)
    pair_contract(max_tokens).save(out)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": int(config.num_hidden_layers),
    }


def save_reranker(model: Any, tokenizer: Any, max_tokens: int, out: Path) -> None:
    """Write a folder that transformers, sentence-transformers' CrossEncoder and vLLM's score API read.

    Both of the last turn the logit into a score by the sigmoid that ``config.json`` names, and cut pairs at the length
    that the tokenizer's files state.

    Raises:
        DataError: the tokenizer, read back from its files, gives other ids.
    """
    before = model.config._attn_implementation
    model.config.sentence_transformers = {"activation_fn": _ACTIVATION}
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    model.config._attn_implementation = before
    # What was cut or padded last stands in a tokenizer's own files, and would cut what other readers read.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    length, tokenizer.model_max_length = tokenizer.model_max_length, max_tokens
    tokenizer.save_pretrained(out)
    tokenizer.model_max_length = length
    content = {"version": _VERSION, "max_tokens": max_tokens}
    (out / RERANKER_FILE).write_text(json.dumps(content, indent=2) + "\n")
    apply_umask(out)
    sample = ("A sample, with Unicode:", "größer, 日本語.")
    if load_tokenizer(out)(*sample)["input_ids"] != tokenizer(*sample)["input_ids"]:
        raise DataError(f"{out}: the saved tokenizer gives other ids than the one in memory")
