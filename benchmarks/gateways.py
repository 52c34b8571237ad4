"""Requests that one, two and four gateways of an endpoint can answer, with an encoder that computes nothing.

    python benchmarks/gateways.py [--quick] [--json] [--requests 3000]

The gateways are the endpoint's own, behind the socket that ``embedloom serve`` lends them; the encoders answer at once with zeros, so
what is measured is the way of a request through a gateway and back. Clients open a connection each and ask for one short text.

Two cores have no room for four gateways, the encoders and the clients, so cores are simulated: a gateway is given a core of its
own by taking the CPU seconds of its process (user and system, as the kernel counts them) for the time that it needs. The busiest one sets the
pace: requests a second = requests answered by all / CPU seconds of the busiest. What gateways cost each other is in it (messages about
quotas, Serve's and Ray's own threads, uneven shares of the connections); what is not in it is waiting for encoders or for the network.
Wall-clock numbers of the same runs come beside it, of all processes on the cores that there are.
"""

import argparse
import asyncio
import hashlib
import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CLIENTS = 64
DIMENSION = 384
KEY = "sk-of-this-benchmark"
ENCODERS_BEHIND = 2


class Nothing:
    """An encoder without a model: zeros at once."""

    def __init__(self) -> None:
        from ray import serve

        self._tag = serve.get_replica_context().replica_tag

    async def encode(self, job: Any) -> Any:
        """As many vectors as texts."""
        from embedloom.serving.messages import EncodeResult

        count = sum(map(len, job.parts))
        vectors = np.zeros((count, DIMENSION), np.float32)
        return EncodeResult(
            vectors, {"document": 8 * count}, "query", "0" * 16, 0.0, 0.0, [], self._tag, {}, 1e5
        )

    async def describe(self) -> Any:
        """A model of that dimension."""
        from embedloom.serving.messages import ModelInfo

        return ModelInfo(DIMENSION, "0" * 16, 512, 512, True)


def application(gateways: int, listener: str) -> Any:
    """The gateways over encoders that compute nothing."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from embedloom.config.serving import ApplicationArgs, ServingConfig
    from embedloom.serving.calls import EndpointSettings
    from embedloom.serving.front import ApiKey
    from embedloom.serving.gateway import ENCODERS, Gateway
    from embedloom.serving.routing import QueuedTokensRouter

    args = ApplicationArgs(
        model_folder="/nothing",
        served_name="nothing",
        listener=listener,
        serving=ServingConfig(gateways=gateways, request_log="none"),
    )
    key = ApiKey(name="all", sha256=hashlib.sha256(KEY.encode()).hexdigest(), requests_per_minute=10**9)
    settings = EndpointSettings(
        served_name="nothing", fingerprint="0", created=0, max_items=8, max_requests=4096, request_timeout_seconds=60.0,
        keys=(key,),
    )  # fmt: skip
    router = RequestRouterConfig(request_router_class=QueuedTokensRouter)
    encoders = serve.deployment(Nothing, name=ENCODERS).options(
        num_replicas=ENCODERS_BEHIND,
        max_ongoing_requests=256,
        request_router_config=router,
        ray_actor_options={"num_cpus": 0.1},
    )
    gateway = serve.deployment(serve.ingress()(Gateway), name="gateway", num_replicas=gateways)
    options = {"max_ongoing_requests": 8192, "ray_actor_options": {"num_cpus": 0.1}}
    return gateway.options(**options).bind(encoders.bind(), settings, None, args.model_dump(mode="json"))


async def ask(port: int, requests: int) -> float:
    """Seconds that so many requests took, over all clients; each has a connection of its own."""
    body = json.dumps({"model": "nothing", "input": "a short query of eight words or so"}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    sent = head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body

    async def client(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(count):
            writer.write(sent)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer.decode())
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client(requests // CLIENTS) for _ in range(CLIENTS)))
    return time.perf_counter() - started


def gateway_seconds() -> dict[int, float]:
    """CPU seconds of each gateway's process so far."""
    import psutil

    found = {}
    for process in psutil.Process().children(recursive=True):
        if ":gateways:gateway" in " ".join(
            process.cmdline()
        ):  # application, deployment: the encoders are no gateways
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def measure(gateways: int, requests: int) -> dict[str, Any]:
    """One number of gateways, warm."""
    from ray import serve

    from embedloom.serving.listener import ListenerOwner

    owner = ListenerOwner("127.0.0.1", 0)
    port = owner._listener.getsockname()[1]
    try:
        serve.start(proxy_location="Disabled")
        serve.run(application(gateways, owner.path), name="gateways", route_prefix="/")
        asyncio.run(ask(port, 10 * CLIENTS))
        before = gateway_seconds()
        idle_started = time.perf_counter()
        seconds = asyncio.run(ask(port, requests))
        after = gateway_seconds()
    finally:
        serve.shutdown()
        owner.close()
    used = sorted(after[pid] - before[pid] for pid in after)
    answered = requests // CLIENTS * CLIENTS
    return {
        "gateways": gateways,
        "requests_per_gateway_core_second": round(answered / used[-1], 1),
        "cpu_ms_per_request": round(1000 * sum(used) / answered, 3),
        "cpu_seconds": [round(one, 2) for one in used],
        "wall_requests_per_second": round(answered / seconds, 1),
        "wall_seconds": round(time.perf_counter() - idle_started, 1),
    }


def main() -> None:
    """Print a row for each number of gateways, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one and two gateways")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--requests", type=int, default=3000)
    given = parser.parse_args()
    os.environ["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"  # as `embedloom serve` has it
    with tempfile.TemporaryDirectory(prefix="gw-", dir="/tmp") as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        import ray  # reads on its first import how to authenticate

        ray.init(
            "local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20
        )
        rows = []
        for count in (1, 2) if given.quick else (1, 2, 4):
            rows.append(measure(count, given.requests))
            print(rows[-1], flush=True)
        ray.shutdown()
    one, two = (row["requests_per_gateway_core_second"] for row in rows[:2])
    result = {
        "name": "gateways", "ours": two, "peer": one, "peer_name": "one gateway", "ratio": round(two / one, 2),
        "unit": "requests/s, the busiest gateway's CPU as its time", "equal": True, "work": {"rows": rows},
    }  # fmt: skip
    if given.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
