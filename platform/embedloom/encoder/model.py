"""The encoder: texts in, unit vectors out, in batches of a token budget. The same class mines, evaluates, embeds and serves."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedloom.core.prompting import PromptContract, Side, pooling_modes
from embedloom.encoder.attention import PackedLayout, filler_tokens, use_packing
from embedloom.encoder.backbone import (
    DTypeName,
    SharedWeights,
    cast_for_inference,
    check_kernels,
    export_weights,
    first_position,
    has_fast_linear,
    is_decoder,
    load_backbone,
    pick_device,
    pick_dtype,
    placed,
    shared_backbone,
)
from embedloom.encoder.cpu_layers import fuse, quantize_linears
from embedloom.encoder.feeding import Queue, Result, batch_tokens, batches_behind, fetch, send
from embedloom.encoder.foreign import Head, HeadModule
from embedloom.encoder.registry import NodeModel, open_model
from embedloom.encoder.tokenizer import CutTexts, contract_ids, formatted_ids, load_tokenizer
from embedloom.errors import ConfigError, DataError

# From token states to one vector per text. ``b`` texts, ``t`` tokens, ``d`` dimensions.


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool token states in float32.

    Args:
        hidden: [b, t, d] states of the last layer.
        mask: [b, t], 1 at real tokens; every row has at least one. Padding may stand on either side.
        pooling: one of ``POOLINGS``, or several joined by ``+``, whose vectors are put behind one another:
            ``mean`` over real tokens (arXiv 2511.07025 §2, instruction tokens included), ``cls`` the first real token,
            ``last_token`` the last real one, ``max`` the largest value of each dimension, ``mean_sqrt_len`` the sum
            over the square root of the length, ``weighted_mean`` with weights 1, 2, 3, ... (arXiv 2202.08904).

    Returns:
        [b, d x modes] float32.

    Raises:
        ConfigError: unknown pooling.
    """
    hidden = hidden.float()
    found = [_pool_one(hidden, mask, mode) for mode in _modes(pooling)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _pool_one(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    if mode == "cls":
        return hidden[rows, mask.argmax(dim=1)]
    if mode == "last_token":
        return hidden[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if mode == "max":
        return hidden.masked_fill(weights == 0, float("-inf")).amax(dim=1)
    if mode == "weighted_mean":
        weights = weights * mask.cumsum(dim=1).unsqueeze(-1)
    total, size = (hidden * weights).sum(dim=1), weights.sum(dim=1)
    return total / (size.sqrt() if mode == "mean_sqrt_len" else size)


def pool_packed(hidden: Tensor, starts: Tensor, pooling: str) -> Tensor:
    """Pool texts that lie behind one another without padding, in float32.

    Args:
        hidden: [tokens, d] states of the last layer.
        starts: [texts + 1], where each text starts; the last entry is the number of tokens.
        pooling: as for ``pool``.

    Returns:
        [texts, d x modes] float32.

    Raises:
        ConfigError: unknown pooling.
    """
    hidden, starts = hidden.float(), starts.long()
    found = [_pool_one_packed(hidden, starts, mode) for mode in _modes(pooling)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _pool_one_packed(hidden: Tensor, starts: Tensor, mode: str) -> Tensor:
    if mode == "cls":
        return hidden[starts[:-1]]
    if mode == "last_token":
        return hidden[starts[1:] - 1]
    if mode in ("mean", "max"):
        return torch.segment_reduce(hidden, mode, offsets=starts)
    lengths = (starts[1:] - starts[:-1]).to(hidden.dtype).unsqueeze(1)
    if mode == "mean_sqrt_len":
        return torch.segment_reduce(hidden, "sum", offsets=starts) / lengths.sqrt()
    first = torch.repeat_interleave(starts[:-1], starts[1:] - starts[:-1])
    weights = (torch.arange(len(hidden), device=hidden.device) - first + 1).to(hidden.dtype).unsqueeze(1)
    return torch.segment_reduce(hidden * weights, "sum", offsets=starts) / (lengths * (lengths + 1) / 2)


def _modes(pooling: str) -> list[str]:
    try:
        return pooling_modes(pooling)
    except ValueError as error:
        raise ConfigError(str(error)) from error


# Token-budget batches: texts of like length together, as many as the budget holds. Pure functions.
#
# Padding, not attention, is what short-text encoders waste (attention is 2 % of the FLOPs at 512 tokens), and a
# row count as batch size makes both memory and time depend on the longest text of an unlucky draw.


# What torch says when the allocator of the CPU, or oneDNN's, got nothing; CUDA has its own type of error.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
)


def token_budget_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group positions into batches whose padded size (rows x longest) stays within the budget.

    Longest first, so that a batch too large for memory fails at once and not after an hour. A single text
    longer than the budget gets a batch of its own.

    Args:
        lengths: token count of each text.
        max_batch_tokens: padded tokens per batch.

    Returns:
        Batches of positions into ``lengths``; each position stands in exactly one.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batches: list[list[int]] = []
    for position in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


@dataclass(slots=True)
class MemoryLimit:
    """Padded tokens that were found to fit into memory; no limit until a batch did not."""

    tokens: int = sys.maxsize


def run_batches(
    lengths: Sequence[int],
    max_batch_tokens: int,
    limit: MemoryLimit,
    work: Callable[[list[int]], None],
) -> None:
    """Call ``work`` on token-budget batches of all positions; one that does not fit into memory is cut in half.

    The half stays the limit, for the batches that follow and for later calls: memory that was short once will be
    short again, and every attempt costs a failed forward.

    Args:
        lengths: token count of each text.
        max_batch_tokens: padded tokens per batch.
        limit: lowered where memory runs out.
        work: gets positions into ``lengths``; must not have done anything lasting when it raises.

    Raises:
        DataError: a single text does not fit.
    """
    rest = list(range(len(lengths)))
    while rest:
        budget = min(max_batch_tokens, limit.tokens)
        planned = token_budget_batches([lengths[position] for position in rest], budget)
        failed: list[int] = []
        done = 0
        for batch in planned:
            positions = [rest[index] for index in batch]
            if failed := [] if _fits(work, positions) else positions:
                break
            done += 1
        if len(failed) == 1:
            raise DataError(
                f"a text of {lengths[failed[0]]:,} tokens does not fit into memory even alone; "
                "lower encoder.max_document_tokens, or give the process more memory"
            )
        if failed:
            limit.tokens = lengths[failed[0]] * len(failed) // 2
        rest = [rest[index] for batch in planned[done:] for index in batch]


def _fits(work: Callable[[list[int]], None], positions: list[int]) -> bool:
    try:
        work(positions)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or numpy means that memory ran out."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


@dataclass(slots=True)
class TokenCount:
    """Real and padded tokens seen so far."""

    real: int = 0
    padded: int = 0

    def add(self, lengths: Sequence[int], packed: bool = False, filler: int = 0) -> None:
        """Count one batch of texts with these lengths; a packed one has no padding but its filler."""
        self.real += sum(lengths)
        self.padded += sum(lengths) + filler if packed else max(lengths, default=0) * len(lengths)

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that was padding, 0 to 1."""
        return 1 - self.real / self.padded if self.padded else 0.0


def _ids(texts: Sequence[Sequence[int]]) -> Tensor:
    """Token ids of texts behind one another, int64 [tokens]."""
    return torch.from_numpy(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in texts]))


DEFAULT_BATCH_TOKENS: int | None = None  # as suits the device, see ``feeding.batch_tokens``

Vectors = np.ndarray[Any, np.dtype[np.float32]]  # [texts, dimension]


class Encoder:
    """Backbone, tokenizer and prompt contract of one model folder; ``tokens`` counts what went through it, ``cuts`` what the
    limits left out."""

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        contract: PromptContract,
        dtype: torch.dtype,
        head: tuple[HeadModule, ...] = (),
    ) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.contract = contract
        self.dtype = dtype
        self.tokens = TokenCount()
        self.cuts = CutTexts()
        self.packed = use_packing(backbone, contract.attention == "causal")
        self._first_position = first_position(backbone)
        self._fused = fuse(backbone) if self.packed else None
        pooled = int(backbone.config.hidden_size) * len(pooling_modes(contract.pooling))
        self.head: Head = Head(head, pooled).to(self.device)
        self._memory = MemoryLimit()
        self.behind = batches_behind(self.device)  # batches whose vectors are outstanding
        self._turn: AbstractContextManager[Any] = Lock() if self.behind else nullcontext()
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @classmethod
    def load(
        cls,
        folder: Path | NodeModel,
        *,
        threads: int | None = None,
        dtype: DTypeName = "auto",
        device: str = "auto",
        contract: PromptContract | None = None,
        trainable: bool = False,
        weights: SharedWeights | None = None,
    ) -> "Encoder":
        """Load a model folder.

        Args:
            folder: Hugging Face layout; without ``contract.json`` (a foreign model) contract, layers after the pooling
                and the place of the weights are read from its sentence-transformers files.
            threads: CPU threads of this process; None keeps torch's setting.
            dtype: compute type.
            device: ``auto``, ``cpu`` or ``cuda``.
            contract: replaces the folder's own.
            trainable: whether gradients will be asked for. On CPU, only then do weights stay plain float32
                parameters, cast by autocast per product; else they are laid out for speed and stored in ``dtype``.
            weights: those of ``share_weights`` in another process, used in place, which decide dtype and device; or of
                ``stored_weights``, copied to the device.

        Raises:
            DataError: no model, no weights, a broken contract, attention that is not what the contract says, or a
                foreign model that our encoder cannot compute.
            ConfigError: int8 on a device, for training or with shared weights, or on a CPU without its kernel.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        if dtype == "int8" and (pick_device(device).type != "cpu" or trainable or weights is not None):
            raise ConfigError("compute_dtype: 'int8' is for inference on CPU, with weights of its own")
        model = open_model(folder)
        model.check_computable()
        root, head = model.transformer, model.head
        if contract is None:
            contract = model.contract
        if weights is not None and weights.dtype is not None:
            check_kernels(weights)
            backbone = shared_backbone(root, contract.attention, weights)
            return cls(backbone, load_tokenizer(root), contract, weights.dtype, head)
        target = pick_device(device)
        compute = pick_dtype(dtype, target)
        stored = compute if target.type == "cuda" else torch.float32
        if weights is None:
            backbone = load_backbone(root, contract.attention, stored).to(target).eval()
        else:
            backbone = placed(shared_backbone(root, contract.attention, weights), stored, target)
        if target.type == "cpu" and not trainable and has_fast_linear(compute):
            cast_for_inference(backbone, compute)
        encoder = cls(backbone, load_tokenizer(root), contract, compute, head)
        if dtype == "int8":
            # Last, as the ways through the model are compared in float32: codes of 8 bits turn 1e-7 into 1e-2.
            quantize_linears(backbone)
            encoder._fused = fuse(backbone) if encoder.packed else None
        return encoder

    def share_weights(self) -> SharedWeights:
        """The weights as numpy arrays over the same memory, for ``load`` in other processes; CPU only."""
        return export_weights(self.backbone, self.dtype)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.head.dimension)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def is_decoder(self) -> bool:
        """Whether the backbone was a causal language model."""
        return is_decoder(self.backbone.config)

    def tokenize(
        self,
        texts: Sequence[str],
        side: Side,
        task_type: str | Sequence[str | None] | None = None,
        instruction: str | Sequence[str | None] | None = None,
    ) -> list[list[int]]:
        """Token ids of each text, formatted by the contract and cut to the side's limit; see ``contract_ids``."""
        return contract_ids(self.tokenizer, self.contract, texts, side, task_type, instruction, self.cuts)

    def tokenize_probe(self, text: str, side: Side, task_type: str | None = None) -> list[int]:
        """Token ids of a fixed text that probes the model: cut without a word, even where its instruction fills the limit."""
        formatted = self.contract.format(text, side, task_type)
        return formatted_ids(self.tokenizer, self.contract, [formatted], side)[0]

    def forward(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Vectors of one batch, with gradients if enabled: [len(token_ids), dimension], float32."""
        lengths = [len(ids) for ids in token_ids]
        filler = filler_tokens(sum(lengths)) if self.packed and self.device.type == "cpu" else 0
        self.tokens.add(lengths, self.packed, filler)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            vectors = (
                self._forward_packed(token_ids, filler)
                if self.packed
                else self._forward_padded(token_ids, lengths)
            )
        vectors = self.head(vectors)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.contract.normalize else vectors

    def _forward_packed(self, token_ids: Sequence[Sequence[int]], filler: int) -> Tensor:
        # Texts of one token: they attend to nothing, and any model has room for them.
        texts = [*token_ids, *[[self._pad_id]] * filler]
        lengths = [len(ids) for ids in texts]
        order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
        causal = self.contract.attention == "causal"
        layout = PackedLayout(
            [lengths[position] for position in order], causal, self.device, self._first_position
        )
        row = _ids([texts[position] for position in order]).unsqueeze(0)
        inputs = self._inputs(row)
        if self._fused is not None and not torch.is_grad_enabled():
            hidden = self._fused(layout=layout, **inputs)
        else:
            hidden = self.backbone(**inputs, position_ids=layout.positions, packed=layout).last_hidden_state[
                0
            ]
        vectors = pool_packed(hidden, layout.starts, self.contract.pooling)
        places = torch.argsort(torch.tensor(order))[: len(token_ids)]
        return vectors[send(places, self.device)]

    def _forward_padded(self, token_ids: Sequence[Sequence[int]], lengths: list[int]) -> Tensor:
        ids, mask = self._pad(token_ids, lengths)
        hidden = self.backbone(**self._inputs(ids), attention_mask=mask).last_hidden_state
        return pool(hidden, mask, self.contract.pooling)

    def _inputs(self, token_ids: Tensor) -> dict[str, Tensor]:
        """What the backbone is called with for these tokens, on its device."""
        return {"input_ids": send(token_ids, self.device)}

    def _pad(self, token_ids: Sequence[Sequence[int]], lengths: list[int]) -> tuple[Tensor, Tensor]:
        longest = max(lengths)
        ids = torch.full((len(lengths), longest), self._pad_id, dtype=torch.long)
        mask = torch.zeros((len(lengths), longest), dtype=torch.long)
        for row, tokens in enumerate(token_ids):
            span = (
                slice(longest - lengths[row], longest)
                if self.contract.padding_side == "left"
                else slice(0, lengths[row])
            )
            ids[row, span] = torch.as_tensor(tokens, dtype=torch.long)
            mask[row, span] = 1
        return ids, send(mask, self.device)

    def embed_tokens(
        self, token_ids: Sequence[Sequence[int]], max_batch_tokens: int | None = DEFAULT_BATCH_TOKENS
    ) -> Vectors:
        """Vectors of tokenized texts, in order: float32 [len(token_ids), dimension].

        Batches shrink for good where memory runs out. Several threads may call it at once; ``tokens`` may then miss some.
        On a GPU they start their batches in turn, and a batch's vectors are waited for when the next was started.

        Args:
            token_ids: lists of numbers or integer arrays, none empty.
            max_batch_tokens: padded tokens a batch; None: as suits the device, see ``feeding``.

        Raises:
            DataError: a vector came out as NaN or infinite, or a single text does not fit into memory.
        """
        vectors: Vectors = np.empty((len(token_ids), self.dimension), dtype=np.float32)

        def start(batch: Sequence[int]) -> Result:
            with self._turn, torch.inference_mode():
                return fetch(self.forward([token_ids[position] for position in batch]))

        def take(batch: Sequence[int], found: Vectors) -> None:
            vectors[batch] = found

        budget = batch_tokens(self.device) if max_batch_tokens is None else max_batch_tokens
        queue = Queue(start, take, self.behind)
        run_batches([len(ids) for ids in token_ids], budget, self._memory, queue)
        queue.finish()
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise DataError(f"the encoder gave a non-finite vector for text {bad} of {len(token_ids)}")
        return vectors

    def embed(
        self,
        texts: Sequence[str],
        side: Side,
        task_type: str | None = None,
        instruction: str | Sequence[str | None] | None = None,
        max_batch_tokens: int | None = DEFAULT_BATCH_TOKENS,
    ) -> Vectors:
        """Tokenize and embed: float32 [len(texts), dimension]."""
        token_ids = self.tokenize(texts, side, task_type, instruction)
        vectors: Vectors = self.embed_tokens(token_ids, max_batch_tokens)
        return vectors
