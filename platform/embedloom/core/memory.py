"""What a GPU must hold to train, embed, search, serve or generate: arithmetic on a model's shape, in bytes.

Letters: P weights, N workers, L layers, h hidden size, k width of keys (= of values), I width of the MLP, T tokens of a
micro-batch. Training an 8B model (P = 7.505e9) with ZeRO-2 on 64 workers, bfloat16 weights and gradients:

    weights 2 P                        15.0 GB
    float32 copy and moments 12 P / N   1.4
    gradients, a partition 2 P / N      0.2
    two buckets of 5e8 gradients        2.0
    weights gathered after a step       1.0
    the largest gradient (embeddings)   1.1
    CUDA, NCCL and cuBLAS               3.0
    activations                         0.62 MB a token with every layer computed again: 10.2 at 16,384 tokens

Activations are counted from what the backward of a Llama layer keeps: 24 h + 6 k + 8 I bytes a token in bfloat16 (norms
keep a float32 copy). Nothing here was measured on a GPU; ``benchmarks/gpu`` holds its peaks against these numbers.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

WeightType = Literal["float32", "bfloat16"]
BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# Of a GPU's memory that the arithmetic may fill: it aims at a tenth, and the caching allocator leaves gaps.
USABLE_SHARE = 0.9
# CUDA context 0.5 GB, cuBLAS workspaces, NCCL's channels and buffers over 64 ranks: a round number, not measured.
CONTEXT_BYTES = 3.0e9
# One process that talks to nobody: context, workspaces, kernels.
LONE_CONTEXT_BYTES = 1.0e9
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size and allgather_bucket_size
# DeepSpeed's stage3_max_live_parameters and stage3_prefetch_bucket_size, gathered at once under ZeRO-3.
_LIVE_ELEMENTS = 1_000_000_000 + 50_000_000
_ADAM_BYTES = 8  # two float32 moments
_LEAST_CACHE = 0.05  # of a GPU, for the keys and values of the answers that an engine writes


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory is counted from.

    Attributes:
        weights: P, all of the model, without a language model's head.
        layers: L.
        hidden_size: h.
        key_size: k, key heads x their width.
        mlp_size: I.
        embedding_weights: of the token embeddings, usually the largest matrix.
    """

    weights: int
    layers: int
    hidden_size: int
    key_size: int
    mlp_size: int
    embedding_weights: int

    @classmethod
    def of_layers(
        cls,
        layers: int,
        hidden_size: int,
        layer_weights: int,
        embedding_weights: int,
        key_size: int | None = None,
        mlp_size: int | None = None,
    ) -> "Shape":
        """A shape from the matrices of one layer; widths that are not stated are those of plain attention and a gated MLP."""
        keys = hidden_size if key_size is None else key_size
        attention = 2 * hidden_size * (hidden_size + keys)
        mlp = max(1, (layer_weights - attention) // (3 * hidden_size)) if mlp_size is None else mlp_size
        weights = layers * layer_weights + embedding_weights + (2 * layers + 1) * hidden_size  # and the norms
        return cls(weights, layers, hidden_size, keys, mlp, embedding_weights)


@dataclass(frozen=True, slots=True)
class Memory:
    """What one device holds at the peak.

    Attributes:
        fixed: what does not grow with the tokens of a batch, part by part, in bytes.
        per_token: bytes for each of its tokens.
        tokens: of the largest batch.
    """

    fixed: dict[str, float] = field(default_factory=dict)
    per_token: float = 0.0
    tokens: int = 0

    @property
    def parts(self) -> dict[str, float]:
        """All parts, the activations last."""
        return {**self.fixed, **({"activations": self.per_token * self.tokens} if self.tokens else {})}

    @property
    def total(self) -> float:
        """Sum of the parts in bytes."""
        return sum(self.parts.values())

    def fits(self, device_bytes: float, share: float = USABLE_SHARE) -> bool:
        """Whether it takes no more than a share of a device of this memory."""
        return self.total <= share * device_bytes

    def largest_batch(self, device_bytes: float, step: int = 1024) -> int:
        """Most tokens of a batch with which it fits, in multiples of ``step``; 0: not even without a batch."""
        room = USABLE_SHARE * device_bytes - sum(self.fixed.values())
        if room <= 0:
            return 0
        if self.per_token <= 0:
            raise ValueError("nothing grows with the batch; largest_batch needs per_token above 0")
        return int(room / self.per_token) // step * step


@dataclass(frozen=True, slots=True)
class Trainer:
    """How a model is trained, as far as memory depends on it.

    Attributes:
        workers: N, a GPU each.
        zero_stage: 0 to 3, what DeepSpeed spreads over the workers.
        weight_dtype: of weights and activations; float32 weights are cast product by product (autocast).
        gradient_dtype: that gradients of bfloat16 weights are summed and reduced in.
        recomputed_layers: layers whose activations are computed again in the backward; None: all.
        overlaps: whether reductions run beside the backward, which takes a second bucket.
        reduces_once: whether ZeRO-2 and 3 reduce once a step and hold whole gradients until then.
        trained_weights: of P; None: all.
        bucket_elements: gradients that are reduced together.
    """

    workers: int
    zero_stage: int
    weight_dtype: WeightType = "bfloat16"
    gradient_dtype: WeightType = "float32"
    recomputed_layers: int | None = 0
    overlaps: bool = False
    reduces_once: bool = False
    trained_weights: int | None = None
    bucket_elements: int = BUCKET_ELEMENTS


def training_memory(shape: Shape, trainer: Trainer, tokens: int) -> Memory:
    """Peak of one worker's GPU, with micro-batches of ``tokens``.

    Raises:
        ValueError: bfloat16 weights without ZeRO, which DeepSpeed does not train with a float32 copy.
    """
    half, stage, spread = trainer.weight_dtype == "bfloat16", trainer.zero_stage, trainer.workers
    if half and stage == 0:
        raise ValueError("bfloat16 weights need zero_stage 1, 2 or 3; found 0")
    size = BYTES[trainer.weight_dtype]
    summed = BYTES[trainer.gradient_dtype] if half else 4
    trained = float(shape.weights if trainer.trained_weights is None else trainer.trained_weights)
    bucket = float(min(trainer.bucket_elements, trained))
    fixed = {
        "weights": float(shape.weights * size) / (spread if stage == 3 else 1),
        "optimizer": trained * (_ADAM_BYTES + (4 if stage else 0)) / (spread if stage else 1),
        "gradients": trained * summed / (spread if stage >= 2 and not trainer.reduces_once else 1),
        "largest gradient": float(min(shape.embedding_weights, trained) * size),
    }
    if stage:
        fixed["buckets"] = bucket * summed * (2 if trainer.overlaps else 1)
        fixed["gathered weights"] = float(min(_LIVE_ELEMENTS, shape.weights) if stage == 3 else bucket) * size
    if not half:
        fixed["cast weights"] = float(shape.weights * 2)
    fixed["CUDA and NCCL"] = CONTEXT_BYTES
    return Memory(fixed, _trained_token(shape, trainer), tokens)


def _trained_token(shape: Shape, trainer: Trainer) -> float:
    """Bytes a token takes in forward and backward."""
    h, k, mlp = shape.hidden_size, shape.key_size, shape.mlp_size
    again = (
        shape.layers if trainer.recomputed_layers is None else min(trainer.recomputed_layers, shape.layers)
    )
    kept = 24 * h + 6 * k + 8 * mlp
    # One layer at a time: what it computes again, the gradients of its MLP and of its input.
    at_work = (kept if again else 0) + 6 * mlp + 2 * h
    last = 12 * h  # the last norm, and a float32 copy that is pooled
    wide = 1 if trainer.weight_dtype == "bfloat16" else 2
    return float(wide * (again * 2 * h + (shape.layers - again) * kept + at_work + last))


def inference_memory(shape: Shape, dtype: str, tokens: int, copies: int = 1) -> Memory:
    """Peak of a GPU on which ``copies`` processes embed or serve, each with weights and batches of its own.

    One layer's tensors at a time: residual stream, queries, keys, values and their mix, and three MLP tensors.
    """
    size = BYTES[dtype]
    fixed = {
        "weights": float(copies * shape.weights * size), "CUDA": copies * LONE_CONTEXT_BYTES,
    }  # fmt: skip
    per_token = copies * (
        size * (5 * shape.hidden_size + 2 * shape.key_size + 3 * shape.mlp_size) + 4 * shape.hidden_size
    )
    return Memory(fixed, float(per_token), tokens)


def search_memory(rows: float, dimension: int, dtype: str, queries: int, block_rows: int) -> Memory:
    """Peak of a GPU that searches a share of ``rows`` vectors: the share, a float32 block on its way, scores of one block."""
    fixed = {
        "vectors": rows * dimension * BYTES[dtype],
        "block": float(min(rows, block_rows) * dimension * 4),
        "scores": float(queries * min(rows, block_rows) * 4 * 2),  # and what top-k sorts
        "CUDA": LONE_CONTEXT_BYTES,
    }
    return Memory(fixed)


def engine_memory(weight_bytes: float, tensor_parallel: int, device_bytes: float) -> Memory:
    """Of one GPU of a vLLM engine: its part of the weights, the forward's peak, and a key-value cache worth having.

    vLLM gives to the cache whatever its share of the memory leaves; below 5 % of the device that is a request or two,
    so as much is asked for. Hold it against vLLM's share (``gpu_memory_share``), not ``USABLE_SHARE``.
    """
    fixed = {
        "weights": weight_bytes / tensor_parallel,
        "forward": 2.0e9,
        "cache": _LEAST_CACHE * device_bytes,
        "CUDA": LONE_CONTEXT_BYTES,
    }
    return Memory(fixed)


# What would fit where something does not, in the order of what it costs: recomputation a third of the time, smaller
# micro-batches little until they are small, more ZeRO traffic, more GPUs money.

_SMALLEST_BATCH = 4096  # tokens: below, ZeRO-2 reduces so often that recomputation is cheaper
_MOST_WORKERS = 1024


@dataclass(frozen=True, slots=True)
class Remedy:
    """A trainer and micro-batch that fit."""

    trainer: Trainer
    tokens: int
    memory: Memory


def training_remedy(
    shape: Shape, trainer: Trainer, tokens: int, least_tokens: int, device_bytes: float
) -> Remedy | None:
    """The cheapest change with which training fits a device; None: nothing does up to 1,024 workers.

    Args:
        shape: of the model.
        trainer: as it is configured.
        tokens: of a micro-batch, as configured.
        least_tokens: of the longest query with its documents, which is never cut in two.
        device_bytes: memory of one GPU.
    """
    stages = [stage for stage in (trainer.zero_stage, 2, 3) if stage >= trainer.zero_stage]
    workers = trainer.workers
    while workers <= _MOST_WORKERS:
        for stage in dict.fromkeys(stages):
            for again in dict.fromkeys((trainer.recomputed_layers, None)):
                # Under ZeRO-3 gradients are reduced with every micro-batch, unless that is what was configured.
                once = trainer.reduces_once and workers > 1 and stage in (trainer.zero_stage, 1, 2)
                tried = replace(
                    trainer, workers=workers, zero_stage=stage, recomputed_layers=again, reduces_once=once
                )
                most = training_memory(shape, tried, 0).largest_batch(device_bytes)
                fitting = min(tokens, most)
                if fitting >= max(least_tokens, min(tokens, _SMALLEST_BATCH)):
                    return Remedy(tried, fitting, training_memory(shape, tried, fitting))
        workers = 2 ** (math.floor(math.log2(workers)) + 1)
    return None
