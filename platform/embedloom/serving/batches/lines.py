"""A batch's file, line by line: read and checked, cut into shards, and its answers written as OpenAI writes them.

A line that cannot be asked is no fault of the others: it becomes a line of the error file, and is counted as failed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic_core import to_json

from embedloom.compute.shards import PART_PATTERN
from embedloom.core.storage import Place
from embedloom.errors import DataError
from embedloom.serving.refusals import ApiError, read_json

LINES_FOLDER, RESULTS_FOLDER = "lines", "results"
_READ = "lines.json"  # written when the lines are complete
# A shard ends with whichever comes first; what a killed job computes again is at most so much an actor.
_SHARD_LINES, _SHARD_TEXTS, _SHARD_BYTES = 512, 2048, 4 * 2**20
_SHOWN = 80

LINE_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int32(), False),  # from 1, as editors count
        pa.field("custom_id", pa.string()),
        pa.field("body", pa.large_string()),  # JSON; null where the line cannot be asked
        pa.field("code", pa.string()),
        pa.field("message", pa.string()),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int32(), False),
        pa.field("answered", pa.bool_(), False),
        pa.field(
            "line", pa.large_binary(), False
        ),  # of the output file where it was answered, else of the error file
    ]
)
COMPLETED_KEY, FAILED_KEY, TOKENS_KEY = b"completed", b"failed", b"tokens"


@dataclass(frozen=True, slots=True)
class Line:
    """One request: a body to ask with, or why there is none."""

    number: int
    custom_id: str | None
    body: str | None = None
    code: str | None = None
    message: str | None = None
    texts: int = 1  # about so many

    @property
    def row(self) -> dict[str, Any]:
        """As ``LINE_SCHEMA`` has it."""
        return {
            "number": self.number,
            "custom_id": self.custom_id,
            "body": self.body,
            "code": self.code,
            "message": self.message,
        }


def whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that comes in pieces, without their ends."""
    rest: list[bytes] = []
    for chunk in chunks:
        *ended, last = chunk.split(b"\n")
        if ended:
            yield b"".join([*rest, ended[0]])
            yield from ended[1:]
            rest = []
        rest.append(last)
    if any(rest):
        yield b"".join(rest)


def requests_of(chunks: Iterable[bytes], endpoint: str, most: int) -> Iterator[Line]:
    """The requests of a file in order; blank lines are none.

    Args:
        chunks: the file.
        endpoint: that every line must ask.
        most: lines that a batch may have.

    Raises:
        DataError: more lines, or none; the whole batch fails.
    """
    seen: set[bytes] = set()
    model: Any = None
    count = 0
    for number, raw in enumerate(whole_lines(chunks), start=1):
        content = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
        if not content:
            continue
        count += 1
        if count > most:
            raise DataError(f"line {number}: the file has more than {most} requests; allowed: at most {most}")
        line = _request(number, content, endpoint, seen)
        if isinstance(line, Line):
            yield line
            continue
        custom_id, body = line
        model = body.get("model") if model is None else model
        if body.get("model") != model:
            yield Line(
                number,
                custom_id,
                code="model_mismatch",
                message=f"line {number}: model is {body.get('model')!r:.80}, the batch's first request has {model!r:.80}",
            )
            continue
        texts = body.get("input")
        yield Line(
            number,
            custom_id,
            body=to_json(body).decode(),
            texts=len(texts) if isinstance(texts, list) and texts and not isinstance(texts[0], int) else 1,
        )
    if not count:
        raise DataError("the file holds no request; allowed: a JSON object a line")


def _request(
    number: int, content: bytes, endpoint: str, seen: set[bytes]
) -> Line | tuple[str, dict[str, Any]]:
    """Name and body of one line, or the line as it cannot be asked."""
    try:
        value = read_json(content)
    except ApiError as error:
        return Line(number, None, code="invalid_json_line", message=f"line {number}: {error}")
    if not isinstance(value, dict):
        return Line(number, None, code="invalid_json_line", message=f"line {number}: no JSON object")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Line(
            number,
            None,
            code="missing_required_parameter",
            message=f"line {number}: custom_id: {_seen(value, 'custom_id')}; allowed: a string that is not empty",
        )
    key = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    if key in seen:
        return Line(
            number,
            custom_id,
            code="duplicate_custom_id",
            message=f"line {number}: custom_id {custom_id!r:.{_SHOWN}} names an earlier line, too",
        )
    seen.add(key)
    wanted: dict[str, Any] = {"method": "POST", "url": endpoint}
    for name, allowed in wanted.items():
        if value.get(name) != allowed:
            message = f"line {number}: {name}: {_seen(value, name)}; allowed: {allowed!r}"
            return Line(number, custom_id, code=f"invalid_{name}", message=message)
    body = value.get("body")
    if not isinstance(body, dict):
        message = f"line {number}: body: {_seen(value, 'body')}; allowed: an object"
        return Line(number, custom_id, code="invalid_body", message=message)
    return custom_id, body


def _seen(value: dict[str, Any], name: str) -> str:
    return f"{value[name]!r:.{_SHOWN}}" if name in value else "missing"


def write_lines(lines: Iterable[Line], work: Place) -> None:
    """Cut requests into shards, a file each, once; the number of lines and the model are written last."""
    if work.exists(_READ):
        return
    waiting: list[Line] = []
    total = shards = 0
    model: str | None = None

    def write() -> None:
        nonlocal shards
        table = pa.Table.from_pylist([line.row for line in waiting], schema=LINE_SCHEMA)
        work.write_table(f"{LINES_FOLDER}/{PART_PATTERN.format(shards)}", table)
        shards += 1
        waiting.clear()

    for line in lines:
        if model is None and line.body is not None:
            found = json.loads(line.body).get("model")
            model = found if isinstance(found, str) else None
        waiting.append(line)
        total += 1
        if (
            len(waiting) >= _SHARD_LINES
            or sum(one.texts for one in waiting) >= _SHARD_TEXTS
            or sum(len(one.body or "") for one in waiting) >= _SHARD_BYTES
        ):
            write()
    if waiting:
        write()
    work.write_json(_READ, {"lines": total, "model": model})


def lines_read(work: Place) -> tuple[int, str | None] | None:
    """How many lines a batch has, and its model; None while they are read."""
    if not work.exists(_READ):
        return None
    found = work.read_json(_READ)
    return found["lines"], found["model"]


# What becomes of each line.


def answer_line(name: str, custom_id: str | None, status: int, request_id: str, body: bytes) -> bytes:
    """A line that was asked: its reply, whatever its status. ``body`` is JSON and is not read again."""
    head = to_json(name) + b',"custom_id":' + to_json(custom_id)
    response = b'{"status_code":%d,"request_id":%b,"body":%b}' % (status, to_json(request_id), body)
    return b'{"id":' + head + b',"response":' + response + b',"error":null}\n'


def refusal_line(name: str, custom_id: str | None, code: str, message: str) -> bytes:
    """A line that was not asked."""
    content = {
        "id": name,
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return bytes(to_json(content)) + b"\n"


def request_name(batch: str, number: int) -> str:
    """The id of a line's request: the same however often it is computed."""
    return f"batch_req_{hashlib.blake2b(f'{batch}/{number}'.encode(), digest_size=12).hexdigest()}"


def results_table(rows: Sequence[dict[str, Any]], tokens: int) -> pa.Table:
    """Results of one shard, with what they count up to in the footer."""
    completed = sum(row["answered"] for row in rows)
    metadata = {
        COMPLETED_KEY: str(completed).encode(),
        FAILED_KEY: str(len(rows) - completed).encode(),
        TOKENS_KEY: str(tokens).encode(),
    }
    return pa.Table.from_pylist(list(rows), schema=RESULT_SCHEMA.with_metadata(metadata))


class Counted:
    """What the finished shards of a batch add up to; each footer is read once."""

    def __init__(self, work: Place) -> None:
        self._work = work
        self._known: set[str] = set()
        self.completed = self.failed = self.tokens = 0

    def look(self) -> "Counted":
        """Count the shards that are new."""
        for name in self._work.names(RESULTS_FOLDER, ".parquet"):
            if name not in self._known:
                metadata = self._work.parquet_footer(name)[0].metadata
                self.completed += int(metadata[COMPLETED_KEY])
                self.failed += int(metadata[FAILED_KEY])
                self.tokens += int(metadata[TOKENS_KEY])
                self._known.add(name)
        return self


def result_lines(work: Place, answered: bool) -> Iterator[bytes]:
    """Lines of the output file, or of the error file, in the order of the requests."""
    for name in work.names(RESULTS_FOLDER, ".parquet"):
        table = work.read_table(name)
        for row in table.filter(table.column("answered") if answered else _negated(table)).to_pylist():
            yield row["line"]


def left_lines(work: Place, batch: str, code: str, message: str) -> Iterator[bytes]:
    """Lines of the error file for the requests that no shard answered."""
    done = {name.rpartition("/")[2] for name in work.names(RESULTS_FOLDER, ".parquet")}
    for name in work.names(LINES_FOLDER, ".parquet"):
        if name.rpartition("/")[2] in done:
            continue
        for row in work.read_table(name, ["number", "custom_id", "code", "message"]).to_pylist():
            own = (row["code"], row["message"]) if row["code"] is not None else (code, message)
            yield refusal_line(request_name(batch, row["number"]), row["custom_id"], *own)


def _negated(table: pa.Table) -> Any:
    import pyarrow.compute as pc

    return pc.invert(table.column("answered"))
