"""What a connection may cost before it is a request, over sockets to a uvicorn of this process; and Serve's own answers."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from embedloom.config.cluster import ListenerConfig
from embedloom.serving.listener import BoundedProtocol, ServeAnswers

LIMITS = ListenerConfig(max_header_kib=4, max_headers=20, header_seconds=0.5, max_client_connections=8)


class App:
    """Answers with what it was sent; ``/wait`` when ``go`` is set, and remembers who left."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()
        self.left = threading.Event()
        self.paths: list[str] = []

    async def __call__(self, scope, receive, send):
        self.paths.append(scope["path"])
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/wait":
            gone = asyncio.ensure_future(receive())
            self.begun.set()
            while not self.go.is_set() and not gone.done():
                await asyncio.sleep(0.01)
            if gone.done():
                self.left.set()
                return
            gone.cancel()
        await JSONResponse({"got": len(body)})(scope, receive, send)


@pytest.fixture(params=["asyncio", "uvloop"])
def served(request):
    with running(request.param) as found:
        yield found


@contextlib.contextmanager
def running(loop: str, limits: ListenerConfig = LIMITS):
    class Protocol(BoundedProtocol):
        pass

    Protocol.limits = limits
    Protocol.open_by_client = type(BoundedProtocol.open_by_client)()
    app = App()
    config = uvicorn.Config(
        app, http=Protocol, loop=loop, lifespan="off", log_level="critical", access_log=False
    )
    server = uvicorn.Server(config)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield app, listening.getsockname()[1]
    finally:
        app.go.set()
        server.should_exit = server.force_exit = True
        thread.join(20)
        listening.close()


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(source, 0))


def everything(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


def ask(port: int, request: bytes) -> bytes:
    with connect(port) as connection:
        connection.sendall(request)
        return everything(connection)


def error_of(reply: bytes) -> dict:
    return json.loads(reply.partition(b"\r\n\r\n")[2])["error"]


FINE = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("request_of", "status", "code"),
    [
        (lambda: b"GET / HTTP/1.1\r\na: " + b"x" * 40_000_000, b"431", "headers_too_large"),
        (lambda: b"GET / HTTP/1.1\r\na: " + b"x" * 5_000 + b"\r\n\r\n", b"431", "headers_too_large"),
        (lambda: b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 21 + b"\r\n", b"431", "headers_too_large"),
        (lambda: b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000, b"431", "headers_too_large"),
        (lambda: b"GET / HTTP/1.1\r\n" + b"a" * 10_000_000, b"431", "headers_too_large"),
        (lambda: b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\n\r\n", b"414", "url_too_long"),
        (lambda: b"\x16\x03\x01 not http at all \r\n\r\n", b"400", "invalid_http"),
    ],
    ids=["40 MB", "5 KB", "21", "100,000", "no colon", "url", "tls"],
)
def test_headers_beyond_a_bound_are_refused_and_the_answer_arrives(served, request_of, status, code):
    app, port = served
    reply = ask(port, request_of())
    assert reply.startswith(b"HTTP/1.1 " + status), reply[:100]
    assert error_of(reply)["code"] == code
    assert not app.paths
    assert ask(port, FINE).startswith(b"HTTP/1.1 200")


def test_headers_within_the_bounds_are_taken_in_pieces_pipelined_and_behind_a_body(served):
    app, port = served
    head = b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * 18 + b"content-length: 3\r\n"
    with connect(port) as connection:
        for byte in head[:40]:
            connection.sendall(bytes([byte]))
        connection.sendall(head[40:] + b"\r\nabc" + head + b"\r\nabc" + FINE)
        assert everything(connection).count(b"HTTP/1.1 200") == 3
    assert app.paths == ["/"] * 3


def test_a_large_body_in_tiny_chunks_is_no_header_and_endless_trailers_are(served):
    _app, port = served
    head = b"POST / HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    assert b'{"got":20000}' in ask(port, head + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n")
    with connect(port) as connection:
        connection.sendall(head + b"1\r\nx\r\n0\r\na: ")
        with contextlib.suppress(OSError):
            for _ in range(200):
                connection.sendall(b"x" * 10_000)
        with contextlib.suppress(OSError):
            assert b" 200 " not in everything(connection)


def test_half_sent_headers_are_closed_after_the_bound(served):
    _, port = served
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for _ in range(6)]
        for connection in connections:
            connection.sendall(b"GET / HTTP/1.1\r\nhost:")
        assert ask(port, FINE).startswith(b"HTTP/1.1 200")
        for connection in connections:
            reply = everything(connection)
            assert reply.startswith(b"HTTP/1.1 408") and error_of(reply)["code"] == "timeout"
        assert everything(stack.enter_context(connect(port))) == b""  # and one that says nothing


def test_the_second_request_of_a_connection_has_the_same_bounds(served):
    _, port = served
    with connect(port) as connection:
        connection.sendall(FINE.replace(b"connection: close\r\n", b""))
        assert b"200" in connection.recv(65536)
        connection.sendall(b"GET / HTTP/1.1\r\nhost:")
        assert b"HTTP/1.1 408" in everything(connection)


def test_one_client_has_so_many_connections_and_others_are_served(served):
    _, port = served
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(port)).sendall(b"G")
        reply = ask(port, b"")
        assert reply.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in reply
        with connect(port, "127.0.0.2") as other:
            other.sendall(FINE)
            assert everything(other).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 20
    while not ask(port, FINE).startswith(b"HTTP/1.1 200"):
        assert time.monotonic() < deadline, "its places are not free again"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_half_closed_client_gets_its_reply(served, version):
    app, port = served
    with connect(port) as connection:
        connection.sendall(b"POST /wait HTTP/" + version + b"\r\ncontent-length: 3\r\n\r\nabc")
        connection.shutdown(socket.SHUT_WR)
        assert app.begun.wait(20)
        time.sleep(0.6)  # a few probes
        app.go.set()
        reply = everything(connection)
    assert reply.startswith(b"HTTP/1.1 200 OK\r\n") and reply.endswith(b'\r\n\r\n{"got":3}')
    assert not app.left.is_set()


def test_all_pipelined_requests_of_a_half_closed_client_are_answered(served):
    app, port = served
    app.go.set()
    with connect(port) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\nGET /c HTTP/1.1\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection).count(b"HTTP/1.1 200") == 3


def test_a_client_that_left_is_noticed_while_its_request_is_computed(served):
    app, port = served
    with connect(port) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\n\r\n")
        assert app.begun.wait(20)
    assert app.left.wait(20)


def test_a_request_that_is_cut_off_is_not_answered(served):
    _, port = served
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\ncontent-length: 30\r\n\r\nabc")
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b""


def serve_like(routes: dict | None, answer) -> TestClient:
    """Serve's proxy, as far as ``ServeAnswers`` sees it."""

    async def listed(_):
        return PlainTextResponse("no routes yet", 503) if routes is None else JSONResponse(routes)

    async def other(_):
        return answer

    app = Starlette(
        routes=[Route("/-/routes", listed), Route("/{rest:path}", other, methods=["GET", "POST"])]
    )
    return TestClient(ServeAnswers(app), raise_server_exceptions=False)


NOT_FOUND = PlainTextResponse(
    "Path '/v1/embeddings' not found. Ping http://.../-/routes for available routes.", 404
)


@pytest.mark.parametrize("routes", [None, {}])
def test_where_no_application_is_there_it_is_starting_or_stopping(routes):
    reply = serve_like(routes, NOT_FOUND).post("/v1/embeddings", json={})
    assert reply.status_code == 503 and reply.headers["retry-after"] == "2"
    assert reply.json()["error"]["code"] == "unavailable"


def test_beside_an_application_an_unknown_path_is_not_found():
    reply = serve_like({"/embed": "embedloom"}, NOT_FOUND).get("/v1/embeddings")
    assert reply.status_code == 404 and "served here: /embed" in reply.json()["error"]["message"]


@pytest.mark.parametrize(("status", "told"), [(500, 503), (503, 503), (429, 429), (408, 408)])
def test_what_serve_says_in_text_is_put_as_an_error(status, told):
    reply = serve_like({"/": "e"}, PlainTextResponse("RayActorError: ...", status)).post("/v1/embeddings")
    assert reply.status_code == told
    assert reply.json()["error"]["code"] == "unavailable" and "Ray" not in reply.text


def test_the_endpoints_own_answers_are_handed_on():
    own = JSONResponse({"error": {"message": "no such model"}}, 404)
    assert serve_like({"/": "e"}, own).get("/v1/models/x").json() == {"error": {"message": "no such model"}}
    metrics = Response("embedloom_requests_total 1", media_type="text/plain")
    assert serve_like({"/": "e"}, metrics).get("/metrics").text == "embedloom_requests_total 1"
    assert serve_like({"/": "e"}, own).get("/-/routes").json() == {"/": "e"}


def test_a_replica_that_died_without_a_word_is_503():
    async def dead(scope, receive, send):
        return None

    reply = TestClient(ServeAnswers(dead)).post("/v1/embeddings", headers={"x-request-id": "r"})
    assert (
        reply.status_code == 503
        and reply.headers["retry-after"] == "2"
        and reply.headers["x-request-id"] == "r"
    )
