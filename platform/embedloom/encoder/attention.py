"""Unpadded batches with attention kept inside each text, and the compiled loop that computes it on CPUs."""

import ctypes
import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from embedloom.encoder.backbone import (
    LONGEST_PROBE,
    autocast_of,
    first_position,
    has_own_code,
    position_limit,
)
from embedloom.encoder.feeding import send
from embedloom.errors import DataError

# Packed attention in one compiled loop (_attention.c) for CPUs, where no gradient is wanted.
#
# torch has no attention for texts of several lengths on CPU. Through sdpa, length by length, it took 13 to 17 % of a forward
# of MiniLM in some six hundred calls; here it takes one a layer, and a quarter (short texts, bfloat16) to nine tenths (2,048
# tokens, float32) of the time (``benchmarks/attention.py``).


_LARGEST_HEAD = 256  # dimensions; MAX_D in _attention.c
_FEWEST_LANES = 8  # AVX2; with vectors of 4, sdpa is up to 3.5 times as fast


@functools.cache
def load_kernel() -> ModuleType | None:
    """The compiled loop, or None where it was not built or the CPU has neither AVX2 nor AVX-512."""
    try:
        kernel = importlib.import_module("embedloom.encoder._attention")
    except ImportError:
        return None
    return kernel if kernel.lanes(16) >= _FEWEST_LANES else None


@functools.cache
def parallel_address() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses; 0 where it has another interface."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0


def kernel_for(query: Tensor, key: Tensor, value: Tensor) -> ModuleType | None:
    """The compiled loop if it computes these: [1, heads, tokens, d] on CPU, float32 or bfloat16, no gradient."""
    sides = (query, key, value)
    if torch.is_grad_enabled() or any(side.device.type != "cpu" for side in sides):
        return None
    if query.dtype not in (torch.float32, torch.bfloat16) or any(side.dtype != query.dtype for side in sides):
        return None
    d = query.shape[3]
    if d % 16 or d > _LARGEST_HEAD or any(side.stride(3) != 1 or side.shape[3] != d for side in sides):
        return None
    return load_kernel()


def attend_packed(
    kernel: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]],
    causal: bool,
    scaling: float | None,
    window: int | None = None,
) -> Tensor:
    """Attention inside each text.

    Args:
        kernel: from ``kernel_for`` these tensors.
        query: [1, heads, tokens, d].
        key: [1, kv_heads, tokens, d]; heads are a multiple of kv_heads.
        value: as ``key``.
        lengths: tokens of the texts, which lie behind one another; their sum is ``tokens``.
        causal: whether a token sees only itself and what is before it.
        scaling: of the scores; None: 1 / sqrt(d).
        window: a token sees those that are less than this away; None: all.

    Returns:
        [1, tokens, heads, d] in the dtype of ``query``.
    """
    _, heads, tokens, d = query.shape
    out = torch.empty((tokens, heads, d), dtype=query.dtype)
    kernel.attention(
        out.data_ptr(),
        *((side.data_ptr(), side.stride(1), side.stride(2)) for side in (query, key, value)),
        lengths,
        tokens,
        heads,
        key.shape[1],
        d,
        d**-0.5 if scaling is None else scaling,
        causal,
        query.dtype == torch.bfloat16,
        parallel_address(),
        torch.get_num_threads(),
        window or 0,
    )
    return out.unsqueeze(0)


# Unpadded batches: all texts of a batch in one row of tokens, with attention kept inside each text.
#
# The matrix products, which are 98 % of the FLOPs of short texts, then see real tokens only, and one forward serves
# texts of any mix of lengths. Attention alone needs to know where texts begin and end: a variable-length kernel on
# GPUs that have one for the dtype, and on CPU without gradients (packed_kernel.py); groups of like lengths through sdpa
# elsewhere.


PACKED_ATTENTION = "embedloom_packed"
# Architectures whose attention hands unknown arguments through to the attention function. MPNet's calls none: it adds a
# bias by distance to its scores, so it keeps padded batches.
_FAMILIES = {
    "bert", "roberta", "xlm-roberta", "camembert", "modernbert", "llama", "mistral", "ministral3", "qwen2", "qwen3",
    "gemma2", "gemma3_text",
}  # fmt: skip
# Attention runs over texts of one length at a time, which need neither padding nor mask: those cost 0.4 us (float32)
# to 0.7 us a token and layer, a group of its own some 30 us (estimated from the calls it adds). So only texts too few
# and short for that share a group, padded to its longest, and none that is shorter than this share of it.
_OWN_GROUP_TOKENS = 64
_LENGTH_RATIO = 0.75
# Lengths of the row that are told apart in each doubling; see filler_tokens.
_LENGTHS_AN_OCTAVE = 32
_PROBE_TOLERANCE = 1e-3  # hidden states of float32 differ by 1e-5 between the two ways of computing them


@dataclass(frozen=True, slots=True)
class LengthGroup:
    """Texts ``first`` to ``last`` of a batch, tokens ``start`` to ``stop``, padded to ``longest`` for attention."""

    start: int
    stop: int
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.lengths[0]

    @property
    def even(self) -> bool:
        """Whether all texts have one length, so attention needs neither padding nor mask."""
        return self.lengths[-1] == self.longest


class PackedLayout:
    """Where the texts of a packed batch lie; lengths must not increase."""

    def __init__(
        self, lengths: Sequence[int], causal: bool, device: torch.device, first_position: int = 0
    ) -> None:
        """The layout of one batch.

        Args:
            lengths: tokens of the texts, in the order in which they lie.
            causal: whether a token sees only itself and what is before it.
            device: of the tensors made here.
            first_position: what positions count from, see ``backbone.first_position``.
        """
        self.lengths = list(lengths)
        self.causal = causal
        self.device = device
        self.first_position = first_position
        self._masks: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}

    @cached_property
    def lengths_array(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The lengths as a compiled loop reads them."""
        return np.array(self.lengths, dtype=np.int64)

    @cached_property
    def starts(self) -> Tensor:
        """int32 [texts + 1], the cumulative lengths."""
        # NumPy's small arrays cost a fifth of torch's small tensors, which a short query would notice.
        sums = np.concatenate(([0], self.lengths_array.cumsum())).astype(np.int32)
        return send(torch.from_numpy(sums), self.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [1, tokens], counting from ``first_position`` in every text."""
        lengths = self.lengths_array
        starts = np.repeat(lengths.cumsum() - lengths - self.first_position, lengths)
        return send(torch.from_numpy(np.arange(len(starts)) - starts).unsqueeze(0), self.device)

    @cached_property
    def groups(self) -> list[LengthGroup]:
        """The texts cut for sdpa."""
        return group_lengths(self.lengths)

    def window(self, tokens: int | None) -> int | None:
        """A window as far as it matters: None if no text is longer."""
        return None if tokens is None or tokens >= self.lengths[0] else tokens

    def real_and_mask(self, number: int, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Of group ``number``: flat positions of its real tokens, and the sdpa mask (True = attend)."""
        if (number, window) not in self._masks:
            group = self.groups[number]
            columns = torch.arange(group.longest, device=self.device)
            real = columns < torch.tensor(group.lengths, device=self.device).unsqueeze(1)
            mask = real[:, None, None, :]
            if self.causal:
                mask = mask & (columns[:, None] >= columns)
            if window is not None:
                mask = mask & ((columns[:, None] - columns).abs() < window)
            self._masks[number, window] = (real.flatten().nonzero().squeeze(1), mask)
        return self._masks[number, window]


def group_lengths(lengths: Sequence[int]) -> list[LengthGroup]:
    """Cut non-increasing lengths into groups: those of one length alone, short and few ones with their like."""
    groups: list[list[int]] = []
    for length, run in groupby(lengths):
        same = list(run)
        small = groups and sum(groups[-1]) < _OWN_GROUP_TOKENS and sum(same) < _OWN_GROUP_TOKENS
        if small and length >= _LENGTH_RATIO * groups[-1][0]:
            groups[-1].extend(same)
        else:
            groups.append(same)
    stops = accumulate(sum(group) for group in groups)
    return [
        LengthGroup(stop - sum(group), stop, tuple(group)) for group, stop in zip(groups, stops, strict=True)
    ]


def filler_tokens(tokens: int) -> int:
    """Tokens to add to a row so that rows have few different lengths, at most 1/32 of it (1 % on average).

    oneDNN compiles the products of every new length and keeps the last thousand of them: measured in a training worker
    of three layers of SmolLM2, 1.3 GB at the first step and 3.9 GB at the three hundredth, for weights of 0.15 GB.
    """
    step = max(1, (1 << (tokens.bit_length() - 1)) // _LENGTHS_AN_OCTAVE)
    return -tokens % step


@dataclass(frozen=True, slots=True)
class _Rule:
    """How scores become weights, beside which tokens of a text see one another."""

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None  # a token sees those less than this away
    softcap: float | None = None  # of Gemma 2: scores are cap * tanh(score / cap)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each text of a packed row; [1, heads, tokens, d] in, [1, tokens, heads, d] out.

    Registered with transformers under ``PACKED_ATTENTION``, which makes it build no mask of its own.

    Raises:
        DataError: called without the layout, which every packed forward passes.
    """
    if packed is None:
        raise DataError("packed attention was called without a layout; run the model through Encoder.forward")
    rule = _Rule(scaling, dropout, packed.window(sliding_window), softcap)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not (dropout or softcap):
        return _varlen(query, key, value, packed, rule), None
    if not (dropout or softcap) and (kernel := kernel_for(query, key, value)):
        lengths = packed.lengths_array
        return attend_packed(kernel, query, key, value, lengths, packed.causal, scaling, rule.window), None
    parts = [
        _group_attention(module, query, key, value, packed, number, rule)
        for number in range(len(packed.groups))
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedLayout, rule: _Rule) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    behind = -1 if rule.window is None else rule.window - 1  # the kernel's bounds count in
    out = varlen_attn(
        *rows,
        packed.starts,
        packed.starts,
        max(packed.lengths),
        max(packed.lengths),
        scale=rule.scaling,
        window_size=(behind, 0 if packed.causal else behind),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.unsqueeze(0)


def _group_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedLayout,
    number: int,
    rule: _Rule,
) -> Tensor:
    group = packed.groups[number]
    texts, longest = len(group.lengths), group.longest
    mine = [tensor[0, :, group.start : group.stop].transpose(0, 1) for tensor in (query, key, value)]
    window = rule.window if rule.window is not None and rule.window < longest else None
    if group.even and window is None and rule.softcap is None:
        real, mask = None, None
        padded = mine
    else:
        real, mask = packed.real_and_mask(number, window)
        padded = [
            tensor.new_zeros(texts * longest, *tensor.shape[1:]).index_copy(0, real, tensor)
            for tensor in mine
        ]
    states = [tensor.unflatten(0, (texts, longest)).transpose(1, 2) for tensor in padded]
    if rule.softcap is not None and mask is not None:
        query, key, value = states
        out = _capped(query, key, value, mask, rule)
    else:
        # In bfloat16 too: torch's CPU kernel keeps scores in float32. Plain products, which round them, take 0.6 to 0.9 of
        # its time, 5 % of a forward, but put the vectors of a decoder with large logits (SmolLM2) 0.02 off in cosine.
        causal = packed.causal and mask is None
        out, _ = sdpa_attention_forward(
            module, *states, mask, dropout=rule.dropout, scaling=rule.scaling, is_causal=causal
        )
    flat = out.flatten(0, 1)
    return (flat if real is None else flat.index_select(0, real)).unsqueeze(0)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: _Rule) -> Tensor:
    """Attention with capped scores, which no kernel of torch has; [texts, heads, longest, d] to [texts, longest, heads, d]."""
    shared = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(shared, dim=1) for side in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if rule.scaling is None else rule.scaling)
    cap = rule.softcap or 1.0
    scores = ((scores / cap).tanh() * cap).masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (torch.nn.functional.dropout(weights, rule.dropout) @ value).transpose(1, 2)


def use_packing(model: PreTrainedModel, causal: bool) -> bool:
    """Switch a model to packed attention if it gives the same hidden states; says whether it did.

    Architectures not known to pass the layout through keep padded batches.
    """
    config = model.config
    if config.model_type not in _FAMILIES or has_own_code(model):
        return False
    ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
    before = config._attn_implementation
    with autocast_of(model):
        expected = _probe(model, causal, packed=False)
        model.set_attn_implementation(PACKED_ATTENTION)
        difference = (expected - _probe(model, causal, packed=True)).abs().max() / expected.abs().max()
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if not difference < (_PROBE_TOLERANCE if exact else 0.1):
        model.set_attn_implementation(before)
        return False
    return True


@torch.no_grad()
def _probe(model: PreTrainedModel, causal: bool, packed: bool) -> Tensor:
    """Hidden states of the real tokens of a few texts."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = _probe_texts(model)
    if packed:
        layout = PackedLayout([len(text) for text in ids], causal, device, first_position(model))
        row = torch.tensor([[token for text in ids for token in text]], device=device)
        hidden = model(input_ids=row, position_ids=layout.positions, packed=layout).last_hidden_state[0]
    else:
        longest = len(ids[0])
        rows = torch.tensor([text + [0] * (longest - len(text)) for text in ids], device=device)
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in ids], device=device)
        hidden = model(input_ids=rows, attention_mask=mask).last_hidden_state[mask.bool()]
    model.train(training)
    return hidden


def _probe_texts(model: PreTrainedModel) -> list[list[int]]:
    """Token ids of texts that do not become longer; the first is longer than the layers' windows, where that is cheap."""
    room = min(LONGEST_PROBE, position_limit(model.config, model) or LONGEST_PROBE) - 2
    stated = (getattr(holder, "sliding_window", None) for holder in (model.config, *model.modules()))
    windows = [window for window in stated if isinstance(window, int) and window <= room]
    lengths = [*([max(windows) + 2] if windows else []), 5, 4, 1]
    return [
        [(5 + place * 7 + length) % model.config.vocab_size for place in range(length)]
        for length in sorted(lengths, reverse=True)
    ]
