"""The socket that the command keeps and the replica borrows: nobody is lost between two replicas, or told nothing."""

import asyncio
import contextlib
import socket
import threading

import httpx
import pytest

from embedloom.errors import ConfigError
from embedloom.serving.listener import ListenerOwner, ReplicaServer, _settings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def listener():
    port = free_port()
    found = ListenerOwner("127.0.0.1", port)
    found.url = f"http://127.0.0.1:{port}"
    yield found
    found.close()


def named(name: str, slow: asyncio.Event | None = None):
    async def app(scope, receive, send):
        if slow is not None and scope["path"].endswith("/slow"):
            await slow.wait()
        body = f"{name} {scope.get('root_path', '')} {scope['path']}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


async def until(client: httpx.AsyncClient, url: str, wanted) -> httpx.Response:
    """The first answer like the wanted one; each attempt on a new connection."""
    while True:
        reply = await client.get(url, headers={"connection": "close"})
        if wanted(reply):
            return reply


def run(work) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_nobody_there_is_503_with_a_time_to_try_again(listener):
    reply = httpx.get(f"{listener.url}/v1/models", trust_env=False)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["code"] == "unavailable"
    assert reply.headers["connection"] == "close"


def test_a_replica_answers_below_its_prefix_and_the_owner_answers_503_when_it_has_left(listener):
    async def work():
        async with httpx.AsyncClient(trust_env=False) as client:
            replica = ReplicaServer(named("one"), listener.path, "/embed")
            reply = await until(client, f"{listener.url}/embed/v1", lambda reply: reply.status_code == 200)
            assert reply.text == "one /embed /embed/v1"
            elsewhere = await client.get(f"{listener.url}/embedded")
            assert elsewhere.status_code == 404
            assert "served here: /embed" in elsewhere.json()["error"]["message"]
            marked = await client.get(f"{listener.url}/embed/v1", headers={"x-request-id": "mine"})
            assert marked.headers.get_list("x-request-id") == ["mine"]
            await replica.leave()
            await until(client, f"{listener.url}/embed/v1", lambda reply: reply.status_code == 503)

    run(work())


def test_idle_connections_outlive_those_of_load_balancers():
    # nginx's upstreams and AWS' balancers keep one for 60 s: whoever closes first must be they.
    assert _settings(named("one")).timeout_keep_alive > 60


def test_no_request_is_lost_when_one_replica_takes_over_from_another(listener):
    async def work():
        answers: list[str] = []
        over = asyncio.Event()

        async def ask(keeps: bool) -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                while not over.is_set():
                    reply = await client.get(
                        f"{listener.url}/x", headers={} if keeps else {"connection": "close"}
                    )
                    reply.raise_for_status()
                    answers.append(reply.text.split()[0])

        async with httpx.AsyncClient(trust_env=False) as client:
            first = ReplicaServer(named("first"), listener.path, "/")
            await until(client, f"{listener.url}/x", lambda reply: reply.status_code == 200)
            clients = [asyncio.create_task(ask(keeps)) for keeps in (True, True, False, False)]
            await until(client, f"{listener.url}/x", lambda _: len(answers) > 50)
            second = ReplicaServer(named("second"), listener.path, "/")
            await until(client, f"{listener.url}/x", lambda reply: reply.text.startswith("second"))
            await first.leave()
            seen = len(answers)
            await until(client, f"{listener.url}/x", lambda _: len(answers) > seen + 50)
            over.set()
            await asyncio.gather(*clients)
            assert set(answers[seen + 8 :]) == {"second"}
            await second.leave()

    run(work())


def test_a_request_in_hand_is_answered_before_its_replica_leaves(listener):
    async def work():
        slow = asyncio.Event()
        async with httpx.AsyncClient(trust_env=False) as client:
            replica = ReplicaServer(named("one", slow), listener.path, "/")
            await until(client, f"{listener.url}/x", lambda reply: reply.status_code == 200)
            asked = asyncio.create_task(client.get(f"{listener.url}/slow"))
            await until(
                client, f"{listener.url}/x", lambda _: replica._server.server_state.total_requests > 2
            )
            leaving = asyncio.create_task(replica.leave())
            await until(client, f"{listener.url}/x", lambda reply: reply.status_code == 503)
            slow.set()
            assert (await asked).text.startswith("one")
            await leaving

    run(work())


def test_a_port_in_use_is_refused(listener):
    port = int(listener.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"serving.port: {port} is in use"):
        ListenerOwner("127.0.0.1", port)


def test_a_closed_listener_frees_its_port_and_ends_its_threads():
    port = free_port()
    before = threading.active_count()
    listener = ListenerOwner("127.0.0.1", port)
    listener.close()
    listener.close()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    for thread in threading.enumerate():
        if thread.name.startswith("listener"):
            thread.join(30)
    assert threading.active_count() <= before
    with contextlib.suppress(OSError):
        socket.socket(socket.AF_UNIX).connect(listener.path)
