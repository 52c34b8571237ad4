"""The Batch API without Ray: files, lines, what becomes of a batch; OpenAI's own client against the routes."""

import asyncio
import base64
import contextlib
import hashlib
import json
import random
import socket
import threading
import time

import fsspec
import httpx
import numpy as np
import openai
import pytest
import uvicorn

from embedloom.config.serving import BatchesConfig, ModelAlias
from embedloom.core.storage import Place
from embedloom.errors import DataError, StageError
from embedloom.serving.api import create_api
from embedloom.serving.batches import lines as cutting
from embedloom.serving.batches.job import Answers
from embedloom.serving.batches.lines import (
    LINES_FOLDER,
    RESULTS_FOLDER,
    requests_of,
    whole_lines,
    write_lines,
)
from embedloom.serving.batches.routes import BatchDesk
from embedloom.serving.batches.runner import Work
from embedloom.serving.batches.store import BatchStore, FileStore, NotFound, new_id
from embedloom.serving.front import ApiKey
from embedloom.serving.metrics import EndpointMetrics
from fakes_serving import FakeEncoder, refused, service_of, settings_of
from fakes_store import s3_server

MODELS = {"tiny-query": ModelAlias(side="query", instruction="Find")}
ENDPOINT = "/v1/embeddings"


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


class Dies:
    """A job that does so many shards and is gone."""

    def __init__(self, shards: int, error: Exception) -> None:
        self.shards = shards
        self.error = error


class HereJob:
    """What BatchJob does with Ray, in this process: one shard at each look."""

    def __init__(self, batch, files: FileStore, encoder: FakeEncoder, dies: Dies | None = None) -> None:
        self.batch, self.files, self.encoder, self.dies = batch, files, encoder, dies
        self.killed = False
        self.computed: list[str] = []

    async def wait(self, seconds: float) -> bool:
        work = self.batch.work
        content = self.files.chunks(self.batch.owner, self.batch.request["input_file_id"])
        write_lines(requests_of(content, ENDPOINT, self.files._limits.max_lines), work)
        done = {name.rpartition("/")[2] for name in work.names(RESULTS_FOLDER)}
        missing = [n for n in work.names(LINES_FOLDER) if n.rpartition("/")[2] not in done]
        if self.dies is not None and self.dies.shards == len(self.computed):
            raise self.dies.error
        if missing:
            metrics = EndpointMetrics()
            api = create_api(service_of(self.encoder), settings_of(models=MODELS, max_requests=99), metrics)
            table = await Answers(self.batch.id, api, metrics).of(work.read_table(missing[0]))
            work.write_table(missing[0].replace(LINES_FOLDER, RESULTS_FOLDER), table)
            self.computed.append(missing[0])
        return len(missing) < 2

    def kill(self) -> None:
        self.killed = True


class Site:
    """A folder with batches, who computes them, and an endpoint over it."""

    def __init__(self, folder, clock=time.time, **limits) -> None:
        self.limits = BatchesConfig(folder=str(folder), **limits)
        self.encoder = FakeEncoder(limit=128, matryoshka=[4, 8])
        self.clock = clock
        self.woken = 0
        self.jobs: list[HereJob] = []
        self.dies: list[Dies | None] = []
        self.work = Work(Place(str(folder)), self.limits, self._start, clock, 0.0, (0.0,))
        self.desk = BatchDesk(self.limits, {}, self._wake)
        for store in (self.desk.files, self.desk.batches):
            store.clock = clock

    def _start(self, batch) -> HereJob:
        dies = self.dies.pop(0) if self.dies else None
        self.jobs.append(HereJob(batch, self.work.files, self.encoder, dies))
        return self.jobs[-1]

    def _wake(self) -> None:
        self.woken += 1

    def run(self) -> None:
        """Bring all that is open to an end."""
        while (batch := self.work.next()) is not None:
            asyncio.run(self.work.bring_to_end(batch))

    @contextlib.contextmanager
    def served(self, **settings):
        api = create_api(
            service_of(self.encoder), settings_of(models=MODELS, max_requests=99, **settings), desk=self.desk
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.should_exit = True
            thread.join()


def line(custom_id, body=None, **changes) -> dict:
    body = {"model": "tiny", "input": custom_id} | (body or {})
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body, **changes}


def content_of(lines) -> bytes:
    return b"".join(
        (one if isinstance(one, bytes) else json.dumps(one, ensure_ascii=False).encode()) + b"\n"
        for one in lines
    )


def official(url, key="unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


def sent(client, lines, **options):
    file = client.files.create(file=("texts.jsonl", content_of(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", **options)


def read(client, file_id) -> list[dict]:
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


# -- lines


@pytest.mark.parametrize("seed", range(5))
def test_lines_are_the_same_however_the_file_comes_in_pieces(seed):
    drawn = random.Random(seed)
    content = "\n".join("äb中"[: drawn.randrange(4)] * drawn.randrange(3) for _ in range(50)).encode()
    pieces, rest = [], content
    while rest:
        cut = drawn.randrange(1, 9)
        pieces.append(rest[:cut])
        rest = rest[cut:]
    expected = content.split(b"\n")
    assert [one for one in whole_lines(pieces) if one] == [one for one in expected if one]
    assert len(list(whole_lines([b"a\n\nb\n"]))) == 3


BAD = [
    (b"{not json", None, "invalid_json_line"),
    (b"[1]", None, "invalid_json_line"),
    (b'{"custom_id": "\xff"}', None, "invalid_json_line"),
    ({"method": "POST", "url": ENDPOINT, "body": {}}, None, "missing_required_parameter"),
    (line(7), None, "missing_required_parameter"),
    (line("first"), "first", "duplicate_custom_id"),
    (line("m", method="GET"), "m", "invalid_method"),
    (line("u", url="/v1/chat/completions"), "u", "invalid_url"),
    (line("b") | {"body": "text"}, "b", "invalid_body"),
    (line("o", {"model": "other"}), "o", "model_mismatch"),
]


@pytest.mark.parametrize(("bad", "custom_id", "code"), BAD)
def test_a_line_that_cannot_be_asked_is_told_apart_from_the_others(bad, custom_id, code):
    found = list(requests_of([content_of([line("first"), b"", bad, line("last")])], ENDPOINT, 10))
    assert [one.number for one in found] == [1, 3, 4]
    assert [one.code for one in found] == [None, code, None]
    assert found[1].custom_id == custom_id and found[1].body is None and "line 3" in found[1].message


def test_a_batch_needs_a_line_and_may_not_have_too_many():
    with pytest.raises(DataError, match="holds no request"):
        list(requests_of([b"\n \n"], ENDPOINT, 10))
    with pytest.raises(DataError, match="line 4: the file has more than 3 requests"):
        list(requests_of([content_of([line(str(n)) for n in range(5)])], ENDPOINT, 3))


def test_shards_are_cut_by_lines_texts_and_bytes_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "_SHARD_LINES", 3)
    monkeypatch.setattr(cutting, "_SHARD_TEXTS", 10)
    monkeypatch.setattr(cutting, "_SHARD_BYTES", 2000)
    many = [line("a"), line("b", {"input": ["x"] * 12}), line("c", {"input": "y" * 2500})]
    many += [line(str(n)) for n in range(4)]
    place = Place(str(tmp_path))
    write_lines(requests_of([content_of(many)], ENDPOINT, 99), place)
    rows = [place.parquet_footer(name)[1] for name in place.names(LINES_FOLDER)]
    assert rows == [2, 1, 3, 1]
    write_lines(iter(()), place)  # a second time nothing is read
    assert [place.parquet_footer(name)[1] for name in place.names(LINES_FOLDER)] == rows


# -- files


def test_files_belong_to_their_owner_and_end(tmp_path):
    clock = Clock()
    store = FileStore(Place(str(tmp_path)), BatchesConfig(folder="x", file_days=2), clock)
    mine = store.add("me", "a.jsonl", iter([b"abc", b"de"]))
    short = store.add("me", "b.jsonl", iter([b"f"]), expires_seconds=3600)
    theirs = store.add("you", "c.jsonl", iter([b"g"]))
    assert b"".join(store.chunks("me", mine.id)) == b"abcde" and mine.bytes == 5
    with pytest.raises(NotFound):
        store.get("me", theirs.id)
    assert [one.id for one in store.listed("me", 10)[0]] == [short.id, mine.id]
    assert [one.id for one in store.listed("me", 10, oldest_first=True)[0]] == [mine.id, short.id]
    page, more = store.listed("me", 1)
    assert more and [one.id for one in store.listed("me", 9, after=page[-1].id)[0]] == [mine.id]
    assert store.used_bytes("me") == 6
    clock.now += 3601
    assert store.sweep() == 1 and [one.id for one in store.listed("me", 10)[0]] == [mine.id]
    clock.now += 2 * 86400
    with pytest.raises(NotFound):
        store.get("you", theirs.id)
    assert store.sweep() == 2 and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_upload_that_breaks_leaves_nothing_to_be_seen(tmp_path):
    clock = Clock()
    store = FileStore(Place(str(tmp_path)), BatchesConfig(folder="x"), clock)

    def broken():
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.add("me", "a", broken())
    assert store.listed("me", 10) == ([], False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    # Bytes without a record, of a process that was killed between the two, go after half a day.
    orphan = new_id("file-", clock())
    Place(str(tmp_path)).write_bytes(f"me/files/{orphan}.data", b"x")
    store.sweep()
    assert (tmp_path / f"me/files/{orphan}.data").exists()
    clock.now += 86400
    store.sweep()
    assert not (tmp_path / f"me/files/{orphan}.data").exists()


@pytest.mark.parametrize("name", ["../you", "file-", "file-xyz", "", "file-" + "0" * 27, "batch_" + "0" * 28])
def test_an_id_from_outside_never_becomes_a_path(tmp_path, name):
    place = Place(str(tmp_path))
    with pytest.raises(NotFound):
        FileStore(place, BatchesConfig(folder="x")).get("me", name)
    with pytest.raises(NotFound):
        BatchStore(place).get("me", name.replace("batch_", "file-"))


# -- batches, by OpenAI's client


def test_the_official_client_gets_what_the_endpoint_answers_to_the_same_bodies(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "_SHARD_LINES", 3)
    bodies = [
        {"input": "plain"},
        {"input": ["two", "texts"], "input_type": "query"},
        {"input": "日本語のテキスト", "dimensions": 4},
        {"input": "base64", "encoding_format": "base64"},
        {"input": "bytes", "encoding_format": "int8"},
        {"input": [5, 6, 7]},
        {"input": "long " * 50, "truncate": "end"},
        {"input": "sts", "task": "sts"},
    ]
    site = Site(tmp_path)
    with site.served() as url:
        client = official(url)
        batch = sent(
            client, [line(f"r{n}", body) for n, body in enumerate(bodies)], metadata={"of": "a test"}
        )
        assert batch.status == "validating" and batch.metadata == {"of": "a test"} and site.woken == 1
        assert batch.expires_at - batch.created_at == 24 * 3600
        site.run()
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed" and batch.model == "tiny" and batch.error_file_id is None
        assert batch.request_counts.to_dict() == {"total": 8, "completed": 8, "failed": 0}
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        results = read(client, batch.output_file_id)
        assert [one["custom_id"] for one in results] == [f"r{n}" for n in range(8)]
        assert len({one["id"] for one in results}) == 8
        tokens = 0
        for one, body in zip(results, bodies, strict=True):
            expected = httpx.post(f"{url}/embeddings", json={"model": "tiny", **body}, trust_env=False)
            assert one["error"] is None and one["response"]["status_code"] == expected.status_code == 200
            assert one["response"]["body"] == expected.json()
            tokens += expected.json()["usage"]["total_tokens"]
        assert batch.usage.total_tokens == batch.usage.input_tokens == tokens
        # The file is the client's own, as any other.
        kept = client.files.retrieve(batch.output_file_id)
        assert kept.purpose == "batch_output" and kept.filename == f"{batch.id}_output.jsonl"
    assert [len(job.computed) for job in site.jobs] == [3]


def test_an_alias_holds_in_a_batch_and_gives_the_encoders_own_vectors(tmp_path):
    site = Site(tmp_path)
    with site.served() as url:
        client = official(url)
        body = {"model": "tiny-query", "encoding_format": "base64"}
        batch = sent(client, [line("what", body)])
        site.run()
        (result,) = read(client, client.batches.retrieve(batch.id).output_file_id)
    embedded = result["response"]["body"]["data"][0]["embedding"]
    vector = np.frombuffer(base64.b64decode(embedded), "<f4")
    assert np.array_equal(vector, site.encoder.embed(["what"], "query", instruction="Find")[0])


def test_bad_lines_are_lines_of_the_error_file_and_counted(tmp_path):
    refusals = [
        (line("empty", {"input": ""}), 400),
        (line("key", {"inputt": "x"}), 400),
        (line("long", {"input": "x" * 500}), 400),
    ]
    site = Site(tmp_path)
    with site.served() as url:
        client = official(url)
        lines = [line("first"), *(bad for bad, _, _ in BAD), *(bad for bad, _ in refusals), line("last")]
        batch = sent(client, lines)
        site.run()
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 15, "completed": 2, "failed": 13}
        assert [one["custom_id"] for one in read(client, batch.output_file_id)] == ["first", "last"]
        errors = read(client, batch.error_file_id)
        assert [one["custom_id"] for one in errors] == [i for _, i, _ in BAD] + ["empty", "key", "long"]
        for one, (_, _, code) in zip(errors, BAD, strict=False):
            assert one["response"] is None and one["error"]["code"] == code and one["error"]["message"]
        for one, (bad, status) in zip(errors[len(BAD) :], refusals, strict=True):
            reply = httpx.post(f"{url}/embeddings", json=bad["body"], trust_env=False)
            assert one["error"] is None and one["response"]["status_code"] == status
            assert one["response"]["body"] == reply.json() == {"error": refused(reply, status)}


@pytest.mark.parametrize("error", [StageError("an actor died"), RuntimeError("anything")])
def test_a_batch_that_was_killed_half_way_goes_on_where_it_was(tmp_path, monkeypatch, error):
    monkeypatch.setattr(cutting, "_SHARD_LINES", 2)
    site = Site(tmp_path)
    site.dies = [Dies(2, error), Dies(0, error), None]
    with site.served() as url:
        client = official(url)
        batch = sent(client, [line(f"text {n}") for n in range(10)])
        site.run()
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed" and batch.request_counts.completed == 10
        assert [one["custom_id"] for one in read(client, batch.output_file_id)] == [
            f"text {n}" for n in range(10)
        ]
    assert [len(job.computed) for job in site.jobs] == [2, 0, 3]  # each shard once
    given = [tuple(ids) for texts in site.encoder.batches for ids in texts]
    assert len(given) == len(set(given)) == 10


class Killed(BaseException):
    """kill -9 of the runner's process."""


def test_a_runner_that_was_killed_is_followed_by_one_that_knows_nothing_but_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "_SHARD_LINES", 2)
    first = Site(tmp_path)
    first.dies = [Dies(3, Killed())]
    with first.served() as url:
        client = official(url)
        batch = sent(client, [line(f"text {n}") for n in range(10)])
        with pytest.raises(Killed):
            first.run()
        seen = client.batches.retrieve(batch.id)
        assert (seen.status, seen.request_counts.completed, seen.request_counts.total) == (
            "in_progress",
            6,
            10,
        )
        assert seen.output_file_id is None
    second = Site(tmp_path)  # the endpoint was started again
    with second.served() as url:
        client = official(url)
        assert client.batches.list().data[0].id == batch.id
        second.run()
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed" and len(read(client, batch.output_file_id)) == 10
    assert (len(first.jobs[0].computed), len(second.jobs[0].computed)) == (3, 2)


def test_a_runner_killed_while_it_wrote_the_results_writes_the_same_files(tmp_path, monkeypatch):
    site = Site(tmp_path)
    with site.served() as url:
        client = official(url)
        batch = sent(client, [line("a"), line("b", {"input": ""})])
        tell = site.work.batches.tell

        def killed(batch, state):
            if state.status == "completed":
                raise Killed
            tell(batch, state)

        with monkeypatch.context() as patch:
            patch.setattr(site.work.batches, "tell", killed)
            with pytest.raises(Killed):
                site.run()
        assert client.batches.retrieve(batch.id).status == "finalizing"
        before = {file.id for file in client.files.list().data}
        site.run()
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert {file.id for file in client.files.list().data} == before  # none twice
        assert {batch.input_file_id, batch.output_file_id, batch.error_file_id} == before
    assert not list((tmp_path / "open").iterdir()) and not list(tmp_path.rglob("work/*"))


def test_cancelled_batches_keep_what_was_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "_SHARD_LINES", 2)
    site = Site(tmp_path)
    with site.served() as url:
        client = official(url)
        batch = sent(client, [line(f"text {n}") for n in range(6)])
        site.dies = [Dies(1, StageError("gone"))]
        looked = site.work._looked

        def then_cancelled(batch, state, counted):
            found = looked(batch, state, counted)
            if found.counts.get("completed") and site.work.batches.cancelled_at(batch) is None:
                assert client.batches.cancel(batch.id).status == "cancelling"
            return found

        monkeypatch.setattr(site.work, "_looked", then_cancelled)
        site.run()
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
        assert len(read(client, batch.output_file_id)) == 2
        assert {one["error"]["code"] for one in read(client, batch.error_file_id)} == {"batch_cancelled"}
        with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'cancelled'"):
            client.batches.cancel(batch.id)
        # One that had not begun.
        other = client.batches.create(
            input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h"
        )
        client.batches.cancel(other.id)
        site.run()
        other = client.batches.retrieve(other.id)
        assert other.status == "cancelled" and other.output_file_id is None


def test_a_batch_expires_and_its_open_requests_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "_SHARD_LINES", 2)
    clock = Clock()
    site = Site(tmp_path, clock)
    with site.served() as url:
        client = official(url)
        batch = sent(client, [line("a"), line("b"), line("c"), b"{"])
        site.dies = [Dies(1, StageError("gone"))]
        start = site.work._start

        def late(batch):
            if site.jobs:
                clock.now += 24 * 3600
            return start(batch)

        monkeypatch.setattr(site.work, "_start", late)
        site.dies.append(Dies(0, StageError("gone")))
        site.run()
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "expired" and batch.expired_at >= batch.expires_at
        assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
        assert [one["custom_id"] for one in read(client, batch.output_file_id)] == ["a", "b"]
        errors = read(client, batch.error_file_id)
        assert [one["error"]["code"] for one in errors] == ["batch_expired", "invalid_json_line"]


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [([line("a")] * 4, "invalid_file", "more than 3 requests"), ([b" "], "invalid_file", "no request")],
)
def test_a_file_that_is_no_batch_fails_as_a_whole(tmp_path, lines, code, words):
    site = Site(tmp_path, max_lines=3)
    with site.served() as url:
        client = official(url)
        batch = sent(client, lines)
        site.run()
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "failed" and batch.output_file_id is None
        (error,) = batch.errors.data
        assert error.code == code and words in error.message


def test_a_file_that_was_deleted_and_actors_that_never_live_fail_the_batch(tmp_path):
    site = Site(tmp_path)
    with site.served() as url:
        client = official(url)
        gone = sent(client, [line("a")])
        assert client.files.delete(gone.input_file_id).deleted
        site.run()
        gone = client.batches.retrieve(gone.id)
        assert gone.status == "failed" and gone.errors.data[0].code == "file_not_found"
        hopeless = sent(client, [line("a"), line("b")])
        site.dies = [Dies(0, RuntimeError("a secret of the machine"))] * 5
        site.run()
        hopeless = client.batches.retrieve(hopeless.id)
        assert hopeless.status == "failed" and hopeless.errors.data[0].code == "server_error"
        assert "secret" not in hopeless.errors.data[0].message


def test_a_batch_lives_in_an_object_store(monkeypatch):
    monkeypatch.setattr(cutting, "_SHARD_LINES", 2)
    with s3_server():
        fsspec.filesystem("s3").mkdir("batches-of-tests")
        site = Site("s3://batches-of-tests/below")
        site.dies = [Dies(2, StageError("gone"))]
        with site.served() as url:
            client = official(url)
            batch = sent(client, [*(line(f"text {n}") for n in range(5)), b"{"])
            site.run()
            batch = client.batches.retrieve(batch.id)
            assert batch.request_counts.to_dict() == {"total": 6, "completed": 5, "failed": 1}
            assert [one["custom_id"] for one in read(client, batch.output_file_id)] == [
                f"text {n}" for n in range(5)
            ]
            assert client.batches.list().data[0].id == batch.id and len(client.files.list().data) == 3
            assert client.files.delete(batch.output_file_id).deleted and len(client.files.list().data) == 2
            assert site.work.files.sweep() == 0 and site.work.batches.open() == []
    assert [len(job.computed) for job in site.jobs] == [2, 1]


def test_batches_that_ended_are_forgotten_with_their_files(tmp_path):
    clock = Clock()
    site = Site(tmp_path, clock, file_days=2)
    file = site.desk.files.add("me", "f", [content_of([line("a")])]).id
    asked = {"endpoint": ENDPOINT, "completion_window": "24h", "input_file_id": file}
    old = site.desk.batches.add("me", asked, {}, 10 * 86400)
    site.run()
    waits = site.desk.batches.add("me", asked, {}, 10 * 86400)
    clock.now += 2 * 86400 - 60
    young = site.desk.batches.add("me", asked, {}, 10 * 86400)
    assert site.work.batches.sweep(2) == 0
    clock.now += 120
    assert site.work.batches.sweep(2) == 1
    with pytest.raises(NotFound):
        site.desk.batches.get("me", old.id)
    assert [one.id for one in site.desk.batches.listed("me", 9)[0]] == [young.id, waits.id]


def test_keys_take_turns(tmp_path):
    site = Site(tmp_path)
    file = {owner: site.desk.files.add(owner, "f", [content_of([line("a")])]).id for owner in ("one", "two")}
    asked = {"endpoint": ENDPOINT, "completion_window": "24h"}
    made = [
        site.desk.batches.add(owner, {**asked, "input_file_id": file[owner]}, {}, 3600).id
        for owner in ("one", "one", "one", "two")
    ]
    order = []
    while (batch := site.work.next()) is not None:
        order.append(batch.id)
        asyncio.run(site.work.bring_to_end(batch))
    assert order == [made[0], made[3], made[1], made[2]]


# -- who may do what


def keyed(*names):
    return tuple(
        ApiKey(name=name, sha256=hashlib.sha256(f"sk-{name}".encode()).hexdigest()) for name in names
    )


def test_keys_see_their_own_files_and_batches_only(tmp_path):
    site = Site(tmp_path)
    with site.served(keys=keyed("one", "two")) as url:
        one, two = official(url, "sk-one"), official(url, "sk-two")
        batch = sent(one, [line("a")])
        site.run()
        batch = one.batches.retrieve(batch.id)
        assert {file.id for file in one.files.list()} == {batch.input_file_id, batch.output_file_id}
        assert one.batches.list().data[0].id == batch.id
        assert two.files.list().data == [] and two.batches.list().data == []
        for look in (
            lambda: two.files.retrieve(batch.input_file_id),
            lambda: two.files.content(batch.output_file_id),
            lambda: two.files.delete(batch.input_file_id),
            lambda: two.batches.retrieve(batch.id),
            lambda: two.batches.cancel(batch.id),
            lambda: two.batches.create(
                input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError, match=r"No such (File|Batch) object"):
                look()
        with pytest.raises(openai.AuthenticationError):
            official(url, "sk-three").files.list()
        assert one.files.content(batch.output_file_id).text
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sk-one" not in stored and keyed("one")[0].sha256.encode() not in stored


def test_lists_come_in_pages(tmp_path):
    site = Site(tmp_path)
    with site.served() as url:
        client = official(url)
        made = [sent(client, [line("a")], metadata={"n": str(n)}).id for n in range(5)]
        assert [one.id for one in client.batches.list(limit=2)] == made[::-1]  # the client turns the pages
        files = [file.id for file in client.files.list(limit=2, order="asc")]
        assert files == sorted(files) and len(files) == 5
        assert client.files.list(purpose="fine-tune").data == []


def test_limits_are_refused_before_anything_is_kept(tmp_path):
    site = Site(tmp_path, max_file_mib=0.001, max_key_gib=2e-6, max_open=1)
    with site.served() as url:
        client = official(url)

        def upload(content, **options):
            return client.files.create(**{"file": ("f", content), "purpose": "batch", **options})

        for content, options, error, words in [
            (b"x" * 200_000, {}, openai.APIStatusError, "the body is larger"),
            (b"x" * 2000, {}, openai.APIStatusError, "2000 bytes; allowed: at most 1048"),
            (b"", {}, openai.BadRequestError, "is empty"),
            (b"x", {"purpose": "fine-tune"}, openai.BadRequestError, "purpose"),
            (
                b"x",
                {"expires_after": {"anchor": "created_at", "seconds": 60}},
                openai.BadRequestError,
                "seconds",
            ),
            (
                b"x",
                {"expires_after": {"anchor": "created_at", "seconds": 10**7}},
                openai.BadRequestError,
                "allowed",
            ),
        ]:
            with pytest.raises(error, match=words) as seen:
                upload(content, **options)
            assert seen.value.status_code == (413 if "larger" in words or "at most" in words else 400)
        assert client.files.list().data == []
        first = upload(b"x" * 1000, expires_after={"anchor": "created_at", "seconds": 7200})
        assert first.expires_at - first.created_at == 7200
        second = upload(b"x" * 1000)
        assert second.expires_at - second.created_at == 30 * 86400
        with pytest.raises(openai.BadRequestError, match="this key's files take 2000 bytes"):
            upload(b"x" * 1000)
        asked = {"input_file_id": first.id, "endpoint": ENDPOINT, "completion_window": "24h"}
        client.batches.create(**asked)
        with pytest.raises(openai.RateLimitError, match="1 batches of this key are not done"):
            client.batches.create(**asked)
        site.run()
        for wrong, words in [
            ({"endpoint": "/v1/chat/completions"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {"k": "v" * 600}}, "metadata"),
        ]:
            with pytest.raises(openai.BadRequestError, match=words):
                client.batches.create(**{**asked, **wrong})


def test_a_page_elsewhere_cannot_upload(tmp_path):
    site = Site(tmp_path)
    with (
        site.served(allowed_origins=("https://search.example.org",)) as url,
        httpx.Client(trust_env=False) as client,
    ):

        def upload(origin):
            headers = {} if origin is None else {"origin": origin}
            form = {"purpose": "batch"}
            return client.post(f"{url}/files", data=form, files={"file": b"x"}, headers=headers).status_code

        own = url.removesuffix("/v1")
        assert [upload(one) for one in (None, own, "https://search.example.org")] == [200] * 3
        assert [upload(one) for one in ("https://evil.example", "null")] == [403, 403]
        refused(client.post(f"{url}/files", json={"purpose": "batch"}), 415)
        refused(client.post(f"{url}/files", data={"purpose": "batch"}, files={"other": b"x"}), 400)
        refused(client.get(f"{url}/files", params={"limit": 0}), 400)
        refused(client.get(f"{url}/batches", params={"after": "nobody"}), 404)
        page = client.get(f"{url.removesuffix('/v1')}/metrics").text
        assert 'path="/v1/files"' in page and "file-" not in page


def test_without_a_folder_there_are_no_such_routes():
    from fakes_serving import client_of

    with client_of(FakeEncoder()) as client:
        assert client.get("/v1/files").status_code == client.post("/v1/batches", json={}).status_code == 404
        assert not any("batch" in path for path in client.get("/openapi.json").json()["paths"])
