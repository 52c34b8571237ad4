"""What several gateways share: the replicas' queues, the keys' quotas, the metrics, a trial; and the listening socket."""

import asyncio
import hashlib
import pickle
import socket
import struct

import pytest
import uvloop
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.serving.app import build_application
from embedloom.serving.front import ApiKey, KeyRing
from embedloom.serving.listener import ListenerOwner, ReplicaServer
from embedloom.serving.messages import EncodeJob, EncodeResult, Part
from embedloom.serving.metrics import EndpointMetrics
from embedloom.serving.peers import UsageExchange, added, gathered, merged, queued_tokens, snapshot
from embedloom.serving.refusals import ApiError
from embedloom.serving.rollout.trial import Side, Window
from embedloom.serving.routing import QueuedTokensRouter, TokenBoard, board_of, estimated_tokens

LANES = ("query", "bulk")
SECRET = "sk-of-these-tests"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


# -- which replica


def test_the_time_that_waits_at_a_replica_is_what_it_said_less_what_it_has_done_since_and_what_was_sent():
    clock = Clock()
    board = TokenBoard(clock)
    assert board.seconds("a") == 0.0
    board.told("a", queued=5000, rate=1000)
    assert board.seconds("a") == 5.0
    clock.now = 2.0
    assert board.seconds("a") == 3.0
    board.sent("a", "request", 4000)
    assert board.seconds("a") == 7.0
    clock.now = 3.0  # the answer to another request says what waits, this one included
    board.told("a", queued=8000, rate=1000)
    assert board.seconds("a") == 8.0
    board.done("a", "request")
    assert board.seconds("a") == 8.0
    clock.now = 100.0
    assert board.seconds("a") == 0.0


def test_a_request_that_is_over_no_longer_counts_and_replicas_that_ended_are_forgotten():
    board = TokenBoard(Clock())
    board.sent("a", "one", 300)
    board.sent("a", "two", 200)
    assert board.seconds("a") == 500.0  # of a replica whose rate is not known: tokens
    board.done("a", "one")
    assert board.seconds("a") == 200.0
    board.keep({"b"})
    board.done("a", "two")
    assert board.seconds("a") == 0.0


def test_tokens_are_guessed_from_texts_and_counted_where_they_are_given():
    texts = Part("document", ["x" * 100, ""])
    ids = Part("document", None, [[1, 2, 3], [4]])
    assert estimated_tokens(EncodeJob((texts,))) == 16 + 30 + 16
    assert estimated_tokens(EncodeJob((ids, ids))) == 8


def test_the_router_travels_by_value_and_finds_the_board_of_its_process():
    sent = RequestRouterConfig(request_router_class=QueuedTokensRouter).get_serialized_request_router_cls()
    router = cloudpickle.loads(sent)
    one = object.__new__(router)
    one._deployment_id = type("DeploymentID", (), {"app_name": "of this test", "name": "encoder"})
    assert one._board() is board_of("of this test", "encoder")


class Routed:
    """A replica as Serve's router sees it."""

    node_id, availability_zone, is_cross_language, actor_id = "n", None, False, None

    def __init__(self, name: str, deployment: DeploymentID) -> None:
        self.replica_id = ReplicaID(name, deployment)
        self.multiplexed_model_ids: set[str] = set()
        self.max_ongoing_requests = 4
        self.ongoing = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.ongoing


def test_serves_router_sends_requests_where_tokens_take_less_time_and_elsewhere_where_there_is_no_room():
    config = DeploymentConfig(
        request_router_config=RequestRouterConfig(request_router_class=QueuedTokensRouter)
    )
    sent = DeploymentConfig.from_proto_bytes(config.to_proto_bytes())
    deployment = DeploymentID(name="encoder", app_name="routed")
    board = board_of("routed", "encoder")

    def request(number: int) -> PendingRequest:
        job = EncodeJob((Part("document", ["x" * 1000]),))
        names = {"request_id": str(number), "internal_request_id": str(number)}
        return PendingRequest(args=[job], kwargs={}, metadata=RequestMetadata(**names))

    async def run():
        router = sent.request_router_config.get_request_router_class()(
            deployment_id=deployment, handle_source=DeploymentHandleSource.REPLICA, self_node_id="n",
            prefer_local_node_routing=False, prefer_local_az_routing=False, self_availability_zone=None,
        )  # fmt: skip
        busy, idle = Routed("busy", deployment), Routed("idle", deployment)
        router.update_replicas([busy, idle])
        board.told("busy", 1e9, 1000.0)
        board.told("idle", 100.0, 0.0)  # no rate is known, so its seconds are tokens
        for number in range(6):
            pending = request(number)
            assert await router._choose_replica_for_request(pending) is idle
            router.on_request_routed(pending, idle.replica_id, None)
        assert board.seconds("idle") == 100 + 6 * (16 + 300)
        idle.ongoing = 4
        assert await router._choose_replica_for_request(request(6)) is busy
        for number in range(6):
            router.on_request_completed(idle.replica_id, str(number))
        assert board.seconds("idle") == 100
        router.update_replicas([busy])
        assert board.seconds("idle") == 0

    asyncio.run(asyncio.wait_for(run(), 60))


# -- what keys used


def rings(count: int, clock: Clock, **quotas) -> list[KeyRing]:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    return [KeyRing([ApiKey(name="one", sha256=digest, **quotas)], clock) for _ in range(count)]


def exchange(rings: list[KeyRing]) -> list[UsageExchange]:
    async def broadcast(method, gateway, usage):
        assert method == "used_elsewhere"
        for number, ring in enumerate(rings):
            if str(number) != gateway:
                ring.take_elsewhere(usage)
        return []

    return [UsageExchange(str(number), ring.collect, broadcast) for number, ring in enumerate(rings)]


def admitted(ring: KeyRing) -> bool:
    try:
        ring.identify(f"Bearer {SECRET}".encode()).begin()
    except ApiError:
        return False
    return True


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_quota_holds_over_all_gateways_but_for_what_is_sent_between_two_messages(count):
    clock = Clock()
    all_rings = rings(count, clock, requests_per_minute=600)
    exchanges = exchange(all_rings)
    through = 0
    for tick in range(5 * 60 * 20):  # five minutes of 40 requests a second, told each half second
        clock.now = tick / 20
        through += admitted(all_rings[tick % count]) + admitted(all_rings[(tick + 1) % count])
        if tick % 10 == 9:
            for one in exchanges:
                asyncio.run(one.tell())
    # A minute's worth at first and five minutes of it, and at most what came within half a second.
    assert 3600 - 20 <= through <= 3600 + 20 * count


def test_tokens_that_another_gateway_computed_are_missing_here():
    clock = Clock()
    one, other = rings(2, clock, tokens_per_minute=600)
    one.identify(f"Bearer {SECRET}".encode()).charge(1200)
    assert admitted(other)
    asyncio.run(exchange([one, other])[0].tell())
    assert not admitted(other)
    clock.now = 61.0
    assert admitted(other)  # 600 too many took a minute to make up for


def test_what_could_not_be_told_is_told_the_next_time():
    told = []

    async def broadcast(method, gateway, usage):
        told.append(usage)
        if len(told) == 1:
            raise TimeoutError

    used = [{"a": (1, 10)}, {"a": (2, 5), "b": (1, 0)}, {}]
    teller = UsageExchange("x", lambda: used.pop(0), broadcast)
    for _ in range(3):
        asyncio.run(teller.tell())
    assert told == [{"a": (1, 10)}, {"a": (3, 15), "b": (1, 0)}]
    assert added({}, {"a": (1, 1)}) == {"a": (1, 1)}


# -- metrics


def answered(count: int) -> CollectorRegistry:
    metrics = EndpointMetrics()
    for _ in range(count):
        metrics.answered("/v1/embeddings", 200, 0.02)
    return metrics.registry


def test_metrics_of_all_gateways_come_in_one_scrape_and_add_up_by_label():
    snapshots = [
        pickle.loads(
            pickle.dumps(snapshot("g1", answered(3), {"r1": (5.0, {"query": 9}), "r2": (1.0, {"bulk": 70})}))
        ),
        pickle.loads(
            pickle.dumps(snapshot("g2", answered(4), {"r1": (1.0, {"query": 2}), "r3": (0.0, {"bulk": 5})}))
        ),
    ]
    text = generate_latest(merged(snapshots, LANES)).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counts = {
        sample.labels["gateway"]: sample.value
        for sample in families["embedloom_requests"].samples
        if sample.name == "embedloom_requests_total"
    }
    assert counts == {"g1": 3.0, "g2": 4.0}
    buckets = [
        sample.value
        for sample in families["embedloom_request_duration_seconds"].samples
        if sample.name.endswith("_bucket") and sample.labels["le"] == "0.025"
    ]
    assert buckets == [3.0, 4.0]
    # What waits at a replica once: r1 by what it said last.
    queued = {sample.labels["lane"]: sample.value for sample in families["embedloom_queued_tokens"].samples}
    assert queued == {"query": 2.0, "bulk": 75.0}
    names = {family.name for family in text_string_to_metric_families(generate_latest(answered(1)).decode())}
    assert names <= set(families)


def test_what_waits_is_nothing_where_nobody_was_asked():
    assert queued_tokens([], LANES) == queued_tokens([{}], LANES) == {"query": 0, "bulk": 0}


def test_a_gateway_whose_peers_are_gone_shows_its_own():
    own = snapshot("g1", answered(1), {})

    async def broken(method):
        raise TimeoutError

    async def both(method):
        return [snapshot("g2", answered(1), {}), own]

    assert [one.gateway for one in asyncio.run(gathered(own, broken))] == ["g1"]
    assert [one.gateway for one in asyncio.run(gathered(own, both))] == ["g1", "g2"]


# -- a trial


def test_what_gateways_saw_of_a_trial_is_judged_together():
    one = Window("new", Side(10, 0, [0.1]), Side(2, 1, [0.2]), 4, 3.0, 1.0, 2, "boom")
    other = Window("new", Side(5, 1, [0.3]), Side(3, 0, [0.4, 0.5]), 1, 1.0, 0.5, 1)
    stale = Window("old", Side(100, 100), Side(100, 100), 100, 0.0)
    both = Window.merged([one, other, stale, Window()])
    assert (both.version, both.live.requests, both.live.errors, both.live.seconds) == (
        "new",
        15,
        1,
        [0.1, 0.3],
    )
    assert (both.candidate.requests, both.candidate.errors, both.candidate.seconds) == (5, 1, [0.2, 0.4, 0.5])
    assert (both.compared, both.overlap, both.cosine, both.last_error) == (5, 0.8, 0.5, "boom")
    assert Window.merged([Window(), Window()]) == Window()


# -- the application


def test_gateways_share_what_may_be_in_hand_and_one_replica_behind_several_is_no_longer_alone(tiny_model):
    def bound(**serving):
        args = ApplicationArgs(
            model_folder=str(tiny_model),
            served_name="t",
            serving=ServingConfig(
                require_gate=False, max_ongoing_requests=8, max_queued_requests=21, **serving
            ),
            scaling=ServeScaling(),
        )
        return build_application(args)._bound_deployment

    assert bound().name == "endpoint" and bound().num_replicas == 1
    gateway = bound(gateways=2)
    assert (gateway.name, gateway.num_replicas) == ("gateway", 2)
    assert gateway.init_args[1].max_requests == 15  # of 29
    encoder = gateway.init_args[0]._bound_deployment
    assert encoder._deployment_config.request_router_config.request_router_class.endswith(
        "QueuedTokensRouter"
    )


def test_an_answer_says_how_fast_its_replica_is():
    from fakes_serving import FakeEncoder, service_of

    async def ask():
        service = service_of(FakeEncoder())
        service.measure()
        result = await service.encode(EncodeJob((Part("document", ["abcd"]),)))
        await service.close()
        return result

    result = asyncio.run(ask())
    assert isinstance(result, EncodeResult) and result.tokens_per_second > 0


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_gateway_leaves_the_socket_as_long_a_queue_as_its_owner_gave_it(loop):
    """uvloop, which Ray runs, listens by the descriptor: a backlog of 1 had the kernel drop connections, for seconds each."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"204" in await reader.readline()
        writer.close()

    def longest_queue(listening):  # tcpi_sacked of a listening socket, see tcp(7) and linux/tcp.h
        return struct.unpack_from("I", listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)[0]

    async def run():
        owner = ListenerOwner("127.0.0.1", 0)
        before = longest_queue(owner._listener)
        servers = [ReplicaServer(app, owner.path, "/") for _ in range(2)]
        try:
            await asyncio.gather(*(ask(owner._listener.getsockname()[1]) for _ in range(40)))
            assert longest_queue(owner._listener) == before >= 40
        finally:
            for server in servers:
                await server.leave()
            owner.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())
