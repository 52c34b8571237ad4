"""The handlers of ``/v1/files`` and ``/v1/batches``, over the storage that they share with the runner."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import StreamingResponse

from embedloom.config.serving import BatchesConfig
from embedloom.core.storage import Place
from embedloom.serving.batches.objects import (
    DAY_SECONDS,
    ENDED,
    MIN_EXPIRY_SECONDS,
    MOST_LISTED,
    PURPOSE,
    WINDOW_SECONDS,
    BatchObject,
    BatchRequest,
    FileObject,
    page_of,
)
from embedloom.serving.batches.store import NOBODY, Batch, BatchStore, FileStore, NotFound
from embedloom.serving.calls import Calls
from embedloom.serving.front import facts_of
from embedloom.serving.refusals import ApiError, read_into
from embedloom.serving.routes import json_reply

Found = TypeVar("Found")
_UPLOAD_SECONDS = 1800.0
_COPY_BYTES = 2**20
FORM_BYTES = 2**16  # of a form, beside its file
_LISTED = 20  # OpenAI's, of batches


class FileQuery(BaseModel):
    """Which files are listed."""

    model_config = ConfigDict(extra="ignore")

    purpose: str | None = None
    limit: Annotated[int, Field(ge=1, le=MOST_LISTED)] = MOST_LISTED
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


class BatchQuery(BaseModel):
    """Which batches are listed."""

    model_config = ConfigDict(extra="ignore")

    limit: Annotated[int, Field(ge=1, le=100)] = _LISTED
    after: str | None = None


class _Form(BaseModel):
    """The fields of an upload beside its file."""

    purpose: Literal["batch"]
    anchor: Literal["created_at"] = Field(default="created_at", alias="expires_after[anchor]")
    seconds: Annotated[int, BeforeValidator(int), Field(ge=MIN_EXPIRY_SECONDS)] | None = Field(
        default=None, alias="expires_after[seconds]"
    )


def upload_form(limits: BatchesConfig) -> dict[str, Any]:
    """JSON Schema of an upload."""
    longest = int(limits.file_days * DAY_SECONDS)
    return {
        "type": "object",
        "properties": {
            "file": {"type": "string", "format": "binary", "description": "JSON lines, a request each."},
            "purpose": {"const": PURPOSE},
            "expires_after[anchor]": {"const": "created_at"},
            "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRY_SECONDS, "maximum": longest},
        },
        "required": ["file", "purpose"],
    }


@dataclass(frozen=True)
class BatchDesk:
    """What the process that answers HTTP needs to take batches.

    Attributes:
        limits: where they lie, and how many may be there.
        blueprint: ``ApplicationArgs`` of this endpoint, by which a batch is computed.
        wake: tells the runner that there is something to do.
    """

    limits: BatchesConfig
    blueprint: dict[str, Any]
    wake: Callable[[], None]
    files: FileStore = field(init=False)
    batches: BatchStore = field(init=False)

    def __post_init__(self) -> None:
        """Open the storage."""
        place = Place(self.limits.folder)
        object.__setattr__(self, "files", FileStore(place, self.limits))
        object.__setattr__(self, "batches", BatchStore(place))

    @property
    def max_file_bytes(self) -> int:
        """Of one upload."""
        return int(self.limits.max_file_mib * 2**20)


class BatchRoutes:
    """The handlers; what reads or writes the storage runs in threads."""

    def __init__(self, calls: Calls, desk: BatchDesk) -> None:
        self._calls = calls
        self._desk = desk

    # -- files

    async def upload_file(self, http: Request) -> Response:
        """Keep a file of requests for a batch (OpenAI's; multipart form)."""
        _check_form(http, self._calls.settings.allowed_origins)
        owner = _owner(http)
        try:
            async with (
                asyncio.timeout(_UPLOAD_SECONDS),
                http.form(max_files=1, max_fields=8, max_part_size=FORM_BYTES) as form,
            ):
                upload = form.get("file")
                given = {name: value for name, value in form.multi_items() if isinstance(value, str)}
                if not isinstance(upload, UploadFile):
                    raise ApiError(400, "file: required, but missing", param="file")
                asked = read_into(_Form, given)
                record = await asyncio.to_thread(self._kept, owner, upload, asked)
        except TimeoutError as error:
            raise ApiError(
                408, f"the file did not arrive within {_UPLOAD_SECONDS:g} seconds", code="timeout"
            ) from error
        except MultiPartException as error:
            raise ApiError(400, f"the body is no form: {error.message}", code="invalid_form") from error
        return json_reply(record.model_dump())

    def _kept(self, owner: str, upload: UploadFile, asked: _Form) -> FileObject:
        desk = self._desk
        size = upload.size or 0
        if size > desk.max_file_bytes:
            raise ApiError(
                413,
                f"file: {size} bytes; allowed: at most {desk.max_file_bytes}",
                param="file",
                code="file_too_large",
            )
        if not size:
            raise ApiError(
                400, "file: is empty; allowed: JSON lines, a request each", param="file", code="empty_file"
            )
        longest = desk.limits.file_days * DAY_SECONDS
        if asked.seconds is not None and asked.seconds > longest:
            raise ApiError(
                400,
                f"expires_after: {asked.seconds} s; allowed: {MIN_EXPIRY_SECONDS} to {longest:.0f}",
                param="expires_after",
            )
        used, most = desk.files.used_bytes(owner), int(desk.limits.max_key_gib * 2**30)
        if used + size > most:
            raise ApiError(
                400,
                f"file: this key's files take {used} bytes, with this one {used + size}; allowed: {most}; delete some",
                param="file",
                code="storage_quota_exceeded",
            )
        name = (upload.filename or "upload.jsonl")[:255]
        return desk.files.add(owner, name, _pieces(upload.file), expires_seconds=asked.seconds)

    async def files(self, http: Request) -> Response:
        """The files of this key."""
        asked = read_into(FileQuery, _query(http))
        found, more = await self._found(
            lambda: self._desk.files.listed(
                _owner(http), asked.limit, asked.after, asked.order == "asc", asked.purpose
            ),
            "after",
        )
        return json_reply(page_of(found, more))

    async def file(self, http: Request) -> Response:
        """One file."""
        name = http.path_params["file_id"]
        record = await self._found(lambda: self._desk.files.get(_owner(http), name), "file_id")
        return json_reply(record.model_dump())

    async def file_content(self, http: Request) -> Response:
        """The bytes of a file."""
        name = http.path_params["file_id"]
        record = await self._found(lambda: self._desk.files.get(_owner(http), name), "file_id")
        chunks = await self._found(lambda: self._desk.files.chunks(_owner(http), name), "file_id")
        headers = {"content-length": str(record.bytes)}
        return StreamingResponse(chunks, headers=headers, media_type="application/octet-stream")

    async def delete_file(self, http: Request) -> Response:
        """Delete a file; a batch that has begun goes on without it."""
        name = http.path_params["file_id"]
        await self._found(lambda: self._desk.files.delete(_owner(http), name), "file_id")
        return json_reply({"id": name, "object": "file", "deleted": True})

    # -- batches

    async def create_batch(self, http: Request) -> Response:
        """Have every request of a file answered within a day (OpenAI's)."""
        request = await self._calls.read(http, BatchRequest)
        shown = await self._found(lambda: self._created(_owner(http), request), "input_file_id")
        self._desk.wake()
        return json_reply(shown.model_dump())

    def _created(self, owner: str, request: BatchRequest) -> BatchObject:
        desk = self._desk
        record = desk.files.get(owner, request.input_file_id)
        if record.purpose != PURPOSE:
            raise ApiError(
                400,
                f"input_file_id: its purpose is {record.purpose!r}; allowed: {PURPOSE!r}",
                param="input_file_id",
                code="invalid_purpose",
            )
        waiting = len(desk.batches.open(owner))
        if waiting >= desk.limits.max_open:
            raise ApiError(
                429,
                f"{waiting} batches of this key are not done; allowed: {desk.limits.max_open}",
                code="too_many_batches",
                retry_after_seconds=60.0,
            )
        batch = desk.batches.add(owner, request.model_dump(), desk.blueprint, WINDOW_SECONDS)
        return desk.batches.shown(batch)

    async def batches(self, http: Request) -> Response:
        """The batches of this key, newest first."""
        asked = read_into(BatchQuery, _query(http))

        def look() -> tuple[list[BatchObject], bool]:
            found, more = self._desk.batches.listed(_owner(http), asked.limit, asked.after)
            return [self._desk.batches.shown(batch) for batch in found], more

        return json_reply(page_of(*await self._found(look, "after")))

    async def batch(self, http: Request) -> Response:
        """One batch, and how far it is."""
        shown = await self._found(lambda: self._desk.batches.shown(self._batch(http)), "batch_id")
        return json_reply(shown.model_dump())

    async def cancel_batch(self, http: Request) -> Response:
        """End a batch; what was answered until then is in its files."""

        def cancelled() -> BatchObject:
            batch = self._batch(http)
            status = self._desk.batches.state(batch).status
            if status in ENDED:
                raise ApiError(409, f"Cannot cancel a batch with status '{status}'.", code="invalid_status")
            self._desk.batches.cancel(batch)
            return self._desk.batches.shown(batch)

        shown = await self._found(cancelled, "batch_id")
        self._desk.wake()
        return json_reply(shown.model_dump())

    def _batch(self, http: Request) -> Batch:
        return self._desk.batches.get(_owner(http), http.path_params["batch_id"])

    async def _found(self, look: Callable[[], Found], param: str) -> Found:
        """What a look into the storage gives; 404 where there is no such thing."""
        try:
            return await asyncio.to_thread(look)
        except NotFound as error:
            kind = "Batch" if param == "batch_id" or str(error).startswith("batch_") else "File"
            raise ApiError(
                404, f"No such {kind} object: {error!s:.80}", param=param, code="not_found"
            ) from error


def _owner(http: Request) -> str:
    """Whose files a request may see."""
    client = facts_of(http.scope).client
    return NOBODY if client is None else str(client.name)


def _query(http: Request) -> dict[str, Any]:
    """Query parameters; numbers are numbers."""
    return {
        name: int(value) if value.isdecimal() and len(value) < 16 else value
        for name, value in http.query_params.items()
    }


def _check_form(http: Request, allowed_origins: tuple[str, ...]) -> None:
    """Refuse what is no form, and a form that a web page elsewhere sent: browsers ask nobody for leave to do that.

    Raises:
        ApiError: 403 or 415.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(
            415,
            f"content-type: {kind!r:.80} is not supported; allowed: multipart/form-data",
            code="unsupported_content_type",
        )
    origin = http.headers.get("origin")
    if origin is not None and origin not in allowed_origins:
        host = origin.partition("://")[2]
        if host != http.headers.get("host"):
            raise ApiError(
                403,
                f"origin: {origin!r:.80} may not upload here; allowed: serving.allowed_origins",
                code="unknown_origin",
            )


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(_COPY_BYTES):
        yield piece
