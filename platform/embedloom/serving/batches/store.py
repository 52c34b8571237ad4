"""Files and batches in a folder or an object store: each key's apart, each file written whole.

    OWNER/files/ID.json       what the file is          OWNER/files/ID.data          its bytes
    OWNER/batches/ID/request.json   what was asked, written once by the process that answers HTTP
    OWNER/batches/ID/cancel.json    that it is to end, by the same
    OWNER/batches/ID/state.json     how far it is, written by the runner alone
    OWNER/batches/ID/work           its lines and their results, while it runs
    open/ID                   of batches that have not ended: whose it is

No file has two writers, so nothing is locked. Ids begin with their time, so names in order are ages in order, and a list
reads no more than it shows. An owner is the name of a key, or ``_`` where the endpoint has no keys.
"""

import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from embedloom.config.base import FrozenConfig, validate
from embedloom.config.serving import BatchesConfig
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.serving.batches.objects import (
    DAY_SECONDS,
    ENDED,
    PURPOSE,
    BatchObject,
    FileObject,
    RequestCounts,
)

NOBODY = "_"  # no name of a key begins so
OPEN_FOLDER = "open"
_ID = re.compile(r"(file-|batch_)[0-9a-f]{28}")


class NotFound(DataError):
    """There is no such file or batch of this owner."""


def new_id(prefix: str, now: float) -> str:
    """``file-`` or ``batch_`` and 28 hex digits, of which the first twelve are the time in milliseconds."""
    return f"{prefix}{int(now * 1000):012x}{secrets.token_hex(8)}"


class FileStore:
    """Files of all owners."""

    def __init__(self, place: Place, limits: BatchesConfig, clock: Callable[[], float] = time.time) -> None:
        self._place = place
        self._limits = limits
        self.clock = clock

    def add(
        self,
        owner: str,
        filename: str,
        chunks: Iterable[bytes],
        purpose: str = PURPOSE,
        expires_seconds: float | None = None,
        name: str | None = None,
    ) -> FileObject:
        """Keep a file.

        Args:
            owner: whose.
            filename: as its owner calls it.
            chunks: its bytes.
            purpose: batch or batch_output.
            expires_seconds: after which it is deleted; None: the operator's default.
            name: its id, where a repeated call must write the same file; None: a new one.
        """
        now = self.clock()
        identifier = name or new_id("file-", now)
        size = self._place.write_chunks(f"{owner}/files/{identifier}.data", chunks)
        seconds = self._limits.file_days * DAY_SECONDS if expires_seconds is None else expires_seconds
        record = FileObject(
            id=identifier,
            bytes=size,
            created_at=int(now),
            expires_at=int(now + seconds),
            filename=filename,
            purpose="batch" if purpose == PURPOSE else "batch_output",
        )
        # Behind its bytes: what has a record is whole.
        self._place.write_json(f"{owner}/files/{identifier}.json", record.model_dump())
        return record

    def get(self, owner: str, identifier: str) -> FileObject:
        """A file that is there and not expired.

        Raises:
            NotFound: it is not.
        """
        name = f"{owner}/files/{_checked(identifier, 'file-')}.json"
        if not self._place.exists(name):
            raise NotFound(identifier)
        record = FileObject.model_validate(self._place.read_json(name))
        if record.expires_at <= self.clock():
            raise NotFound(identifier)
        return record

    def chunks(self, owner: str, identifier: str) -> Iterator[bytes]:
        """The bytes of a file; see ``get``."""
        self.get(owner, identifier)
        return self._place.chunks(f"{owner}/files/{identifier}.data")

    def delete(self, owner: str, identifier: str) -> None:
        """Delete a file; see ``get``."""
        self.get(owner, identifier)
        self._remove(owner, identifier)

    def listed(
        self,
        owner: str,
        limit: int,
        after: str | None = None,
        oldest_first: bool = False,
        purpose: str | None = None,
    ) -> tuple[list[FileObject], bool]:
        """Files of an owner from behind ``after`` on, newest first, and whether there are more.

        Raises:
            NotFound: ``after`` is no id.
        """
        found: list[FileObject] = []
        for identifier in _behind(self._ids(owner), "file-", after, oldest_first):
            try:
                record = self.get(owner, identifier)
            except NotFound:  # expired, or deleted meanwhile
                continue
            if purpose in (None, record.purpose):
                found.append(record)
            if len(found) > limit:
                return found[:limit], True
        return found, False

    def used_bytes(self, owner: str) -> int:
        """What the files of an owner take."""
        return sum(record.bytes for record in self.listed(owner, limit=2**62)[0])

    def sweep(self) -> int:
        """Delete expired files of all owners, and bytes whose record was never written; returns how many files."""
        count = 0
        for owner in owners(self._place):
            records = set(self._ids(owner))
            for identifier in records:
                try:
                    self.get(owner, identifier)
                except NotFound:
                    self._remove(owner, identifier)
                    count += 1
            for name in self._place.names(f"{owner}/files", ".data"):
                identifier = name.rpartition("/")[2].removesuffix(".data")
                # Half a day: an upload that is under way has bytes and no record yet.
                if identifier not in records and _age_seconds(identifier, self.clock()) > DAY_SECONDS / 2:
                    self._place.delete(name)
        return count

    def _ids(self, owner: str) -> list[str]:
        names = self._place.names(f"{owner}/files", ".json")
        return [name.rpartition("/")[2].removesuffix(".json") for name in names]

    def _remove(self, owner: str, identifier: str) -> None:
        for ending in ("json", "data"):
            name = f"{owner}/files/{identifier}.{ending}"
            if self._place.exists(name):
                self._place.delete(name)


class BatchState(FrozenConfig):
    """How far a batch is; times are Unix seconds."""

    status: str = "validating"
    model: str | None = None
    counts: dict[str, int] = Field(default_factory=dict)
    tokens: int = 0
    errors: tuple[dict[str, Any], ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    at: dict[str, int] = Field(default_factory=dict)  # when it got each status
    attempts: int = 0  # of which each ended without an answer

    def now(self, status: str, when: float, **changes: Any) -> "BatchState":
        """The same in another status."""
        return self.model_copy(update={"status": status, "at": {**self.at, status: int(when)}, **changes})


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as it was asked for."""

    id: str
    owner: str
    request: dict[str, Any]  # the client's
    blueprint: dict[
        str, Any
    ]  # ``ApplicationArgs`` of the endpoint that took it: it is computed by the model of that hour
    created_at: int
    expires_at: int
    place: Place = field(compare=False)

    @property
    def work(self) -> Place:
        """Where it is worked on."""
        return self.place.child("work")


class BatchStore:
    """Batches of all owners."""

    def __init__(self, place: Place, clock: Callable[[], float] = time.time) -> None:
        self._place = place
        self.clock = clock

    def add(self, owner: str, request: dict[str, Any], blueprint: dict[str, Any], seconds: float) -> Batch:
        """Keep a new batch, which ends after so many seconds at the latest."""
        now = self.clock()
        identifier = new_id("batch_", now)
        content = {
            "owner": owner,
            "request": request,
            "blueprint": blueprint,
            "created_at": int(now),
            "expires_at": int(now + seconds),
        }
        self._place.write_json(f"{owner}/batches/{identifier}/request.json", content)
        self._place.write_bytes(f"{OPEN_FOLDER}/{identifier}", owner.encode())
        return self.get(owner, identifier)

    def get(self, owner: str, identifier: str) -> Batch:
        """A batch.

        Raises:
            NotFound: this owner has none of that id.
        """
        name = f"{owner}/batches/{_checked(identifier, 'batch_')}"
        if not self._place.exists(f"{name}/request.json"):
            raise NotFound(identifier)
        content = self._place.read_json(f"{name}/request.json")
        return Batch(
            identifier,
            content["owner"],
            content["request"],
            content["blueprint"],
            content["created_at"],
            content["expires_at"],
            self._place.child(name),
        )

    def listed(self, owner: str, limit: int, after: str | None = None) -> tuple[list[Batch], bool]:
        """Batches of an owner from behind ``after`` on, newest first, and whether there are more.

        Raises:
            NotFound: ``after`` is no id.
        """
        known = _folders(self._place, f"{owner}/batches")
        found = [
            self.get(owner, identifier)
            for _, identifier in zip(range(limit + 1), _behind(known, "batch_", after), strict=False)
        ]
        return found[:limit], len(found) > limit

    def open(self, owner: str | None = None) -> list[Batch]:
        """Batches that have not ended, oldest first; of one owner, or of all."""
        found = []
        for name in self._place.names(OPEN_FOLDER):
            theirs = self._place.read_bytes(name).decode()
            if owner in (None, theirs):
                found.append(self.get(theirs, name.rpartition("/")[2]))
        return found

    def sweep(self, days: float) -> int:
        """Forget batches that ended, and are older than their files may be; returns how many."""
        count = 0
        for owner in owners(self._place):
            for identifier in _folders(self._place, f"{owner}/batches"):
                if _age_seconds(identifier, self.clock()) < days * DAY_SECONDS:
                    break  # names in order are ages in order
                batch = self.get(owner, identifier)
                if self.state(batch).status in ENDED:
                    batch.place.remove()
                    count += 1
        return count

    def cancel(self, batch: Batch) -> None:
        """Have a batch end; whether it has, ``state`` says."""
        if not batch.place.exists("cancel.json"):
            batch.place.write_json("cancel.json", {"at": int(self.clock())})

    def cancelled_at(self, batch: Batch) -> int | None:
        """When its owner asked for its end; None: never."""
        return batch.place.read_json("cancel.json")["at"] if batch.place.exists("cancel.json") else None

    def state(self, batch: Batch) -> BatchState:
        """How far it is, as the runner last wrote."""
        if not batch.place.exists("state.json"):
            return BatchState()
        return validate(BatchState, batch.place.read_json("state.json"), batch.id)

    def tell(self, batch: Batch, state: BatchState) -> None:
        """Write how far it is; what has ended is no longer open, and is worked on no more."""
        batch.place.write_json("state.json", state.model_dump(mode="json"))
        if state.status in ENDED:
            if self._place.exists(f"{OPEN_FOLDER}/{batch.id}"):
                self._place.delete(f"{OPEN_FOLDER}/{batch.id}")
            batch.work.remove()

    def shown(self, batch: Batch) -> BatchObject:
        """What its owner is told."""
        state = self.state(batch)
        asked = None if state.status in ENDED else self.cancelled_at(batch)
        times = {f"{status}_at": when for status, when in state.at.items() if status != "validating"}
        if asked is not None:
            times["cancelling_at"] = asked
        usage = None
        if state.status in ENDED and state.tokens:
            usage = {"input_tokens": state.tokens, "total_tokens": state.tokens}
        return BatchObject.model_validate(
            {
                "id": batch.id,
                **{key: batch.request[key] for key in ("endpoint", "input_file_id", "completion_window")},
                "metadata": batch.request.get("metadata"),
                "model": state.model,
                "status": "cancelling" if asked is not None else state.status,
                "errors": {"data": list(state.errors)} if state.errors else None,
                "output_file_id": state.output_file_id,
                "error_file_id": state.error_file_id,
                "created_at": batch.created_at,
                "expires_at": batch.expires_at,
                "request_counts": RequestCounts(**state.counts).model_dump(),
                "usage": usage,
                **times,
            }
        )


def owners(place: Place) -> list[str]:
    """Whoever has files or batches."""
    return [name for name in _folders(place, "") if name != OPEN_FOLDER]


def _folders(place: Place, folder: str) -> list[str]:
    """Sorted names of what lies in a folder."""
    return [name.rpartition("/")[2] for name in place.names(folder)]


def _checked(identifier: str, prefix: str) -> str:
    """An id from outside, which becomes part of a path."""
    if not identifier.startswith(prefix) or not _ID.fullmatch(identifier):
        raise NotFound(identifier)
    return identifier


def _age_seconds(identifier: str, now: float) -> float:
    return now - int(identifier[-28:-16], 16) / 1000 if _ID.fullmatch(identifier) else 0.0


def _behind(identifiers: list[str], prefix: str, after: str | None, oldest_first: bool = False) -> list[str]:
    """Ids behind ``after`` in the order that is asked for; results of batches are in the order of their names, too."""
    ordered = sorted(identifiers, reverse=not oldest_first)
    if after is None:
        return ordered
    _checked(after, prefix)
    return [one for one in ordered if (one > after if oldest_first else one < after)]
