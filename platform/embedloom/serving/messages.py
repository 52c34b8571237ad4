"""What gateway and encoder replica say to each other; light, so the gateway's process needs no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from embedloom.instructions import Side


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Inputs of one request; exactly one of ``texts`` and ``token_ids`` is given."""

    side: Side
    texts: list[str] | None = None
    token_ids: list[list[int]] | None = None
    task_type: str = "retrieval"
    instruction: str | None = None
    truncate: Literal["none", "end"] = "none"


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One forward pass over texts of one or several requests."""

    texts: int
    tokens: int
    seconds: float


@dataclass(slots=True)
class EncodeResult:
    """Vectors of one request in input order: float32 [n, dimension], and what they cost."""

    vectors: np.ndarray[Any, np.dtype[np.float32]]
    tokens: int
    tokenize_seconds: float
    queue_seconds: float
    batches: list[BatchRecord] = field(default_factory=list)  # each batch is reported by one of its requests


@dataclass(frozen=True, slots=True)
class Refusal:
    """An input the encoder will not take; a value and not an exception, so it crosses processes as it is."""

    message: str
    code: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the loaded encoder says of itself."""

    dimension: int
    contract_hash: str
    max_query_tokens: int
    max_document_tokens: int
    normalize: bool
    matryoshka_dimensions: tuple[int, ...] = ()
