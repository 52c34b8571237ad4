"""Our encoder as mteb sees one: each text goes through the model's prompt contract, by task type and side."""

from typing import Any

import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from embedloom.encoder.model import DEFAULT_BATCH_TOKENS, Encoder
from embedloom.errors import DataError
from embedloom.evaluation.retrieval_task import INSTRUCTION_COLUMN
from embedloom.instructions import Side

# mteb's task types in our words; what is missing here is not about text alone.
TASK_TYPES = {
    "Retrieval": "retrieval",
    "InstructionRetrieval": "retrieval",
    "Reranking": "reranking",
    "InstructionReranking": "instruction_reranking",
    "Classification": "classification",
    "Regression": "classification",
    "MultilabelClassification": "multilabel_classification",
    "Clustering": "clustering",
    "STS": "sts",
    "Summarization": "sts",
    "PairClassification": "pair_classification",
    "BitextMining": "bitext",
}
# One instruction for all tasks of these types, whatever mteb's metadata says (arXiv 2511.07025 §2).
_FIXED_INSTRUCTION = ("sts", "pair_classification", "bitext")


class EncoderModel(AbsEncoder):
    """mteb's encoder protocol around an ``Encoder``; keeps no vectors."""

    def __init__(
        self, encoder: Encoder, name: str, revision: str, max_batch_tokens: int = DEFAULT_BATCH_TOKENS
    ) -> None:
        self.encoder = encoder
        self.max_batch_tokens = max_batch_tokens
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
        own: list[str] = []
        for batch in inputs:
            texts.extend(batch["text"])
            own.extend(batch.get(INSTRUCTION_COLUMN, ()))
        side: Side = "document" if prompt_type == PromptType.document else "query"
        task_type = task_type_of(task_metadata)
        instruction = own or task_instruction(task_metadata, task_type)
        return self.encoder.embed(texts, side, task_type, instruction, self.max_batch_tokens)


def task_type_of(metadata: TaskMetadata) -> str:
    """Our task type of an mteb task.

    Raises:
        DataError: a type that a text encoder cannot take.
    """
    if metadata.type not in TASK_TYPES:
        raise DataError(
            f"mteb task {metadata.name!r}: type {metadata.type!r} is not supported; "
            f"allowed: {', '.join(sorted(TASK_TYPES))}"
        )
    return TASK_TYPES[metadata.type]


def task_instruction(metadata: TaskMetadata, task_type: str) -> str | None:
    """The task's own instruction, or None for the contract's; which side gets it is the contract's rule."""
    if task_type in _FIXED_INSTRUCTION:
        return None
    prompt = metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get(PromptType.query.value)
    return prompt or None


def model_meta(encoder: Encoder, name: str, revision: str) -> ModelMeta:
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
