"""Our encoder as mteb sees one: each text goes through the model's prompt contract, by task type and side."""

from typing import Any

import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from embedloom.encoder.model import DEFAULT_BATCH_TOKENS, Encoder, Vectors
from embedloom.evaluation.benchmark_instructions import Role, role_of
from embedloom.evaluation.retrieval_task import INSTRUCTION_COLUMN
from embedloom.evaluation.vector_store import VectorTable, text_keys
from embedloom.retrieval.sentence_teacher import SentenceEncoder


class EncoderModel(AbsEncoder):
    """mteb's encoder protocol around an ``Encoder``; takes vectors from ``known`` where they are there."""

    def __init__(
        self,
        encoder: Encoder | SentenceEncoder,
        name: str,
        revision: str,
        max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> None:
        self.encoder = encoder
        self.max_batch_tokens = max_batch_tokens
        self.known: VectorTable | None = None
        self.instructed = True  # whether texts get the benchmark's instructions, see ``role_of``
        self.mteb_model_meta = model_meta(encoder, name, revision)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Vectors of all texts of a data loader: float32 [texts, dimension].

        Args:
            inputs: batches with a ``text`` list each.
            task_metadata: decides the task type and, with ``prompt_type``, the instruction.
            hf_split: unused.
            hf_subset: unused.
            prompt_type: query or document; None where both texts play the same part.
            kwargs: mteb's encode arguments; batches follow our token budget instead.
        """
        texts: list[str] = []
        own: list[str | None] = []
        for batch in inputs:
            texts.extend(batch["text"])
            if self.instructed:
                own.extend(instruction or None for instruction in batch.get(INSTRUCTION_COLUMN, ()))
        role = role_of(task_metadata, prompt_type, self.encoder.contract, self.instructed)
        if self.known is None:
            return self._embed(texts, role, own or role.instruction)
        return self._embed_unknown(texts, role, own or [role.instruction] * len(texts), self.known)

    def _embed(self, texts: list[str], role: Role, instruction: Any) -> Vectors:
        return self.encoder.embed(texts, role.side, role.task_type, instruction, self.max_batch_tokens)

    def _embed_unknown(
        self, texts: list[str], role: Role, instructions: list[str | None], known: VectorTable
    ) -> Vectors:
        """Vectors from ``known``; the rest is embedded, each distinct text once, and not kept."""
        keys = text_keys(self.encoder.contract, role.task_type, texts, [role.side] * len(texts), instructions)
        found, vectors = known.look_up(keys)
        if found.all():
            return vectors
        missing = np.flatnonzero(~found)
        _, first, number = np.unique(keys[missing], axis=0, return_index=True, return_inverse=True)
        chosen = missing[np.sort(first)]
        place = np.argsort(np.argsort(first))  # unique sorts by key; the texts stay in mteb's order
        fresh = self._embed([texts[i] for i in chosen], role, [instructions[i] for i in chosen])
        result: Vectors = np.empty((len(texts), self.encoder.dimension), dtype=np.float32)
        result[found] = vectors
        result[missing] = fresh[place[number.reshape(-1)]]
        return result


def model_meta(encoder: Encoder | SentenceEncoder, name: str, revision: str) -> ModelMeta:
    """What mteb stores beside the results (``model_meta.json``).

    Args:
        encoder: the loaded model.
        name: ``organisation/model``; mteb makes the result folder from it.
        revision: identity of the weights.
    """
    contract = encoder.contract
    return ModelMeta.create_empty(
        {
            "name": name,
            "revision": revision,
            "n_parameters": sum(parameter.numel() for parameter in encoder.backbone.parameters()),
            "max_tokens": max(contract.max_query_tokens, contract.max_document_tokens),
            "embed_dim": encoder.dimension,
            "framework": ["PyTorch", "Sentence Transformers", "safetensors"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": "{task}" in contract.template,
        }
    )
