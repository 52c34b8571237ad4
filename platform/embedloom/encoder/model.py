"""The encoder: texts in, unit vectors out. The same class mines, evaluates, embeds and serves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedloom.encoder.backbone import is_decoder, load_backbone
from embedloom.encoder.batching import MemoryLimit, TokenCount, run_batches
from embedloom.encoder.device import DTypeName, pick_device, pick_dtype
from embedloom.encoder.fused import fuse
from embedloom.encoder.head import Head, HeadModule
from embedloom.encoder.int8 import quantize_linears
from embedloom.encoder.linear import cast_for_inference, has_fast_linear
from embedloom.encoder.packing import PackedLayout, filler_tokens, use_packing
from embedloom.encoder.pooling import pool, pool_packed
from embedloom.encoder.registry import open_model
from embedloom.encoder.shared import SharedWeights, export_weights, shared_backbone
from embedloom.encoder.tokenizer import CutTexts, contract_ids, formatted_ids, load_tokenizer
from embedloom.errors import ConfigError, DataError
from embedloom.instructions import PromptContract, Side, pooling_modes

DEFAULT_BATCH_TOKENS = 4096

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
        self._fused = fuse(backbone) if self.packed else None
        pooled = int(backbone.config.hidden_size) * len(pooling_modes(contract.pooling))
        self.head: Head = Head(head, pooled).to(self.device)
        self._memory = MemoryLimit()
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @classmethod
    def load(
        cls,
        folder: Path,
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
            weights: those of ``share_weights`` in another process, used in place; decides dtype and device.

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
        if weights is not None:
            # Made on another machine, perhaps; there the kernel itself would fail with less to say.
            if weights.inference_linear and not has_fast_linear(weights.dtype):
                raise DataError(
                    f"shared {weights.dtype} weights: this CPU has no kernels for them; set dtype"
                )
            backbone = shared_backbone(root, contract.attention, weights)
            return cls(backbone, load_tokenizer(root), contract, weights.dtype, head)
        target = pick_device(device)
        compute = pick_dtype(dtype, target)
        stored = compute if target.type == "cuda" else torch.float32
        backbone = load_backbone(root, contract.attention, stored).to(target).eval()
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
        layout = PackedLayout([lengths[position] for position in order], causal, self.device)
        row = torch.tensor([[token for position in order for token in texts[position]]])
        if self._fused is not None and not torch.is_grad_enabled():
            hidden = self._fused(row, layout)
        else:
            hidden = self.backbone(
                input_ids=row.to(self.device), position_ids=layout.positions, packed=layout
            ).last_hidden_state[0]
        vectors = pool_packed(hidden, layout.starts, self.contract.pooling)
        places = torch.argsort(torch.tensor(order, device=self.device))
        return vectors[places[: len(token_ids)]]

    def _forward_padded(self, token_ids: Sequence[Sequence[int]], lengths: list[int]) -> Tensor:
        ids, mask = self._pad(token_ids, lengths)
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        return pool(hidden, mask, self.contract.pooling)

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
            ids[row, span] = torch.tensor(tokens, dtype=torch.long)
            mask[row, span] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.inference_mode()
    def embed_tokens(
        self, token_ids: Sequence[Sequence[int]], max_batch_tokens: int = DEFAULT_BATCH_TOKENS
    ) -> Vectors:
        """Vectors of tokenized texts, in order: float32 [len(token_ids), dimension].

        Batches shrink for good where memory runs out. Several threads may call it at once; ``tokens`` may then miss some.

        Raises:
            DataError: a vector came out as NaN or infinite, or a single text does not fit into memory.
        """
        vectors: Vectors = np.empty((len(token_ids), self.dimension), dtype=np.float32)

        def work(batch: list[int]) -> None:
            vectors[batch] = self.forward([token_ids[position] for position in batch]).cpu().numpy()

        run_batches([len(ids) for ids in token_ids], max_batch_tokens, self._memory, work)
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
        max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> Vectors:
        """Tokenize and embed: float32 [len(texts), dimension]."""
        token_ids = self.tokenize(texts, side, task_type, instruction)
        vectors: Vectors = self.embed_tokens(token_ids, max_batch_tokens)
        return vectors
