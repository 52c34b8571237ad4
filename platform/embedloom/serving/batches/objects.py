"""OpenAI's files and batches as types: what clients send, and what they get."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from embedloom.serving.schemas import ClosedRequest, Integer, Reply, whole_number

ENDPOINT = "/v1/embeddings"  # the one that a batch may ask
PURPOSE = "batch"
DAY_SECONDS = 86_400
WINDOW_SECONDS = DAY_SECONDS
MIN_EXPIRY_SECONDS = 3600  # OpenAI's least, of an expires_after
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: frozenset[str] = frozenset({"failed", "completed", "expired", "cancelled"})
_MOST_METADATA, _KEY_CHARACTERS, _VALUE_CHARACTERS = 16, 64, 512
MOST_LISTED = 10_000


class ExpiresAfter(ClosedRequest):
    """When a file is deleted."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY_SECONDS), BeforeValidator(whole_number)]


class BatchRequest(ClosedRequest):
    """``POST /v1/batches``: have every request of an uploaded file answered."""

    input_file_id: str = Field(min_length=1, description="A file of this key, uploaded with purpose batch.")
    endpoint: Literal["/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(
        default=None,
        description="Up to 16 pairs of a client's own; names of at most 64 characters, values of at most 512.",
        json_schema_extra={
            "maxProperties": _MOST_METADATA,
            "propertyNames": {"maxLength": _KEY_CHARACTERS},
            "additionalProperties": {"type": "string", "maxLength": _VALUE_CHARACTERS},
        },
    )
    output_expires_after: ExpiresAfter | None = Field(
        default=None, description="When the results are deleted; null: the operator's default."
    )

    @field_validator("metadata")
    @classmethod
    def _pairs_are_short(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        pairs = (value or {}).items()
        if len(pairs) > _MOST_METADATA or any(
            len(name) > _KEY_CHARACTERS or len(text) > _VALUE_CHARACTERS for name, text in pairs
        ):
            raise ValueError(
                f"allowed: {_MOST_METADATA} pairs, names of at most {_KEY_CHARACTERS} characters, values of {_VALUE_CHARACTERS}"
            )
        return value


class FileObject(Reply):
    """One file: uploaded, or the results of a batch."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: Integer
    expires_at: Integer
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(Reply):
    """Reply of ``GET /v1/files``, newest first unless ``order`` says otherwise."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Reply):
    """Reply of ``DELETE /v1/files/{file_id}``."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class RequestCounts(Reply):
    """Requests of a batch: all, those answered, and those whose answer is an error."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(Reply):
    """Why a batch as a whole failed."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(Reply):
    """The list of them."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchUsage(Reply):
    """Tokens that a batch cost; ``output_tokens`` is 0, as vectors are not made of tokens."""

    input_tokens: int
    input_tokens_details: dict[Literal["cached_tokens"], int] = Field(default={"cached_tokens": 0})
    output_tokens: int = 0
    output_tokens_details: dict[Literal["reasoning_tokens"], int] = Field(default={"reasoning_tokens": 0})
    total_tokens: int


class BatchObject(Reply):
    """One batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = Field(default=None, description="Of its first request; known once the file was read.")
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None = Field(
        default=None, description="Answered requests, in the order of the file."
    )
    error_file_id: str | None = Field(default=None, description="Those that were refused or not answered.")
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: BatchUsage | None = None
    metadata: dict[str, str] | None = None


class BatchList(Reply):
    """Reply of ``GET /v1/batches``, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_of(records: list[Any], has_more: bool) -> dict[str, Any]:
    """A ``FileList`` or ``BatchList`` as plain values."""
    data = [record.model_dump() for record in records]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}
