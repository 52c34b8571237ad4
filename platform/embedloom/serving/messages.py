"""What gateway and encoder replica say to each other; light, so the gateway's process needs no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from embedloom.core.prompting import USUAL_TASK, Side

Lane = Literal["query", "bulk"]
Vectors = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Part:
    """Inputs that are prompted alike; exactly one of ``texts`` and ``token_ids`` is given."""

    side: Side
    texts: list[str] | None = None
    token_ids: list[list[int]] | None = None
    task_type: str | None = None  # a task type or the name of a task; None: the contract's default
    instruction: str | None = None
    name: str = "input"  # the request's field they came in, for refusals
    is_list: bool = True  # whether a refusal says which item
    places: list[int] | None = None  # where in the request's field each input stood; None: in this order

    def __len__(self) -> int:
        """Number of inputs."""
        return len(self.texts if self.texts is not None else self.token_ids or [])

    def where(self, index: int) -> str:
        """The field and, in a list, the item."""
        return f"{self.name}[{self.places[index] if self.places else index}]" if self.is_list else self.name


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """What one request wants encoded, by one replica, so that its vectors can be compared during a redeploy."""

    parts: tuple[Part, ...]
    truncate: Literal["none", "start", "end"] = "none"
    contract_hash: str | None = None  # refuse under another contract
    fingerprint: str | None = None  # refuse with other weights
    own_ids_only: bool = False  # refuse token ids that this model's tokenizer cannot have made
    pieces: bool = False  # to tokenize: the text of each token, too
    deadline: float | None = None  # Unix seconds after which nobody waits for the answer


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One forward pass over texts of one or several requests."""

    texts: int
    tokens: int
    seconds: float


@dataclass(slots=True)
class EncodeResult:
    """Vectors of one request in input order: float32 [n, dimension], and what they cost."""

    vectors: Vectors
    side_tokens: dict[str, int]
    lane: Lane
    contract_hash: str
    tokenize_seconds: float
    queue_seconds: float
    batches: list[BatchRecord] = field(default_factory=list)  # each batch is reported by one of its requests
    replica: str = ""  # who computed it
    queued: dict[str, int] = field(default_factory=dict)  # tokens that waited there afterwards, by lane
    tokens_per_second: float = 0.0  # as measured there
    truncated: int = 0  # inputs that were cut to the limit

    @property
    def tokens(self) -> int:
        """Real tokens, template and special tokens included."""
        return sum(self.side_tokens.values())


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: its id, its text, and the characters of the prompted text that it stands for."""

    id: int
    text: str
    special: bool
    start: int | None = None  # None: of no character, as special tokens are
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """Token ids of one request in input order, and how many inputs were cut."""

    ids: list[list[int]]
    contract_hash: str
    truncated: int = 0
    pieces: list[list[Piece]] | None = None  # where the job asks for them


@dataclass(frozen=True, slots=True)
class Refusal:
    """An input the encoder will not take; a value and not an exception, so it crosses processes as it is."""

    message: str
    code: str
    param: str | None = None
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the loaded encoder says of itself."""

    dimension: int
    contract_hash: str
    max_query_tokens: int
    max_document_tokens: int
    normalize: bool
    instructions: dict[str, str] = field(default_factory=dict)  # the default of every task type
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name, as ``replies.TaskCard``
    default_task: str = USUAL_TASK  # of texts that come without a task
    matryoshka_dimensions: tuple[int, ...] = ()
    pooling: str = "mean"
