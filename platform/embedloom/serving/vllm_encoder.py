"""vLLM's pooling runner behind the same contract: our prompts and token ids go in, so only the forward pass is its own.

It pools as the model folder's config says, which is not taken on trust: before a replica serves, the golden texts must
come out as the exported vectors do.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from embedloom.compute.generation import require_engine
from embedloom.compute.vllm_engine import set_environment
from embedloom.core.prompting import PromptContract, Side
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.registry import open_model
from embedloom.encoder.tokenizer import contract_ids, load_tokenizer
from embedloom.errors import DataError
from embedloom.serving.messages import EncodeJob, EncodeResult, Refusal, Vectors
from embedloom.serving.rollout.golden import check_golden, expected_vectors
from embedloom.serving.service import text_ids

_MEMORY_SHARE = 0.9  # of what a replica reserved of a GPU
_POOLING = {"mean": "MEAN", "last_token": "LAST", "cls": "CLS"}


class VLLMEncoder:
    """What serving needs of an encoder, computed by vLLM in this process."""

    contract: PromptContract

    def __init__(self, folder: Path, threads: int, dtype: DTypeName, gpus: float) -> None:
        """Load the model.

        Args:
            folder: a model folder.
            threads: compute threads (CPU only).
            dtype: compute type.
            gpus: what this replica reserved; a part of one limits vLLM's memory to that part.

        Raises:
            MissingDependency: vLLM is not installed.
            DataError: a model that vLLM cannot load.
        """
        require_engine(gpus > 0, "serving.engine: vllm")
        set_environment(gpus > 0, threads, batch_invariant=False)
        from vllm import LLM, TokensPrompt
        from vllm.config import PoolerConfig

        opened = open_model(folder)
        self.contract = opened.contract
        if self.contract.pooling not in _POOLING or opened.head:
            raise DataError(
                f"{folder}: serving.engine: vllm computes a transformer with pooling {', '.join(_POOLING)}, and this model "
                f"has pooling {self.contract.pooling} or layers behind it; allowed: torch"
            )
        self.tokenizer = load_tokenizer(folder)
        self._folder, self._dtype, self._prompt = folder, dtype, TokensPrompt
        limit = max(self.contract.max_query_tokens, self.contract.max_document_tokens)
        options: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 2**29}
        if gpus > 0:
            options = {"gpu_memory_utilization": _MEMORY_SHARE * min(1.0, gpus)}
        pooler = PoolerConfig(
            pooling_type=_POOLING[self.contract.pooling], use_activation=self.contract.normalize
        )
        try:
            self._llm = LLM(
                model=str(folder), runner="pooling", dtype=dtype, max_model_len=limit, pooler_config=pooler,
                enable_prefix_caching=False, **options,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{folder}: vLLM cannot load this model: {error}") from error
        config = self._llm.llm_engine.model_config.hf_config
        self.backbone: Any = SimpleNamespace(config=config)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.backbone.config.hidden_size)

    def check(self) -> None:
        """Hold the golden texts' vectors to the exported ones.

        Raises:
            ServeError: another vector.
        """
        expected, golden_dtype = expected_vectors(self._folder)
        check_golden(self._answer, expected, golden_dtype, self._dtype)

    def tokenize(
        self, texts: Sequence[str], side: Side, task_type: str | None = None, instruction: str | None = None
    ) -> list[list[int]]:
        """Token ids, cut to the side's limit; as ``Encoder.tokenize``."""
        return contract_ids(self.tokenizer, self.contract, texts, side, task_type, instruction)

    def embed_tokens(self, token_ids: Sequence[Sequence[int]], max_batch_tokens: int = 4096) -> Vectors:
        """Vectors in order: float32 [len(token_ids), dimension]; vLLM splits batches by itself.

        Raises:
            DataError: a vector came out as NaN or infinite.
        """
        prompts = [self._prompt(prompt_token_ids=list(ids)) for ids in token_ids]
        outputs = self._llm.embed(prompts, use_tqdm=False)
        vectors: Vectors = np.asarray([output.outputs.embedding for output in outputs], dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise DataError("vLLM gave a non-finite vector")
        return vectors

    def _answer(self, job: EncodeJob) -> EncodeResult | Refusal:
        (part,) = job.parts
        ids = text_ids(self, part, slice(0, None), job.truncate)
        if isinstance(ids, Refusal):
            return ids
        return EncodeResult(self.embed_tokens(ids), {}, "query", self.contract.hash, 0.0, 0.0)
