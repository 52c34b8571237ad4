"""The load: texts, and clients that wait for their answer (closed loop) or send at given times (open loop).

aiohttp and not a load tool: locust and k6 have no open loop that counts from the planned time of a request (so a slow
server hides its own queue), and count requests, not tokens. aiohttp comes with Ray; its client takes a few per cent of
the two cores, the same from every server.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

WORDS = ["read", "write", "parquet", "table", "column", "filter", "sort", "join", "merge", "array", "vector", "matrix", "socket", "thread", "queue", "lock", "index", "window", "buffer", "stream", "shard", "replica", "token", "model", "query", "answer"]  # fmt: skip


def texts(kind: str, count: int, seed: int = 0) -> list[str]:
    """``short``: queries of 4 to 12 words. ``mixed``: 4 to 160 words, log-normal around 30, as chunks of documents."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        length = (
            draw.randint(4, 12) if kind == "short" else max(4, min(160, round(draw.lognormvariate(3.4, 0.8))))
        )
        made.append(" ".join(draw.choices(WORDS, k=length)) + f" {number}")
    return made


STOCK = 4000


class Load:
    """Requests of one text each to an OpenAI-compatible server."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model: str, stock: list[str], counts: list[int]
    ) -> None:
        self.session, self.url, self.model, self.stock, self.counts = session, url, model, stock, counts
        self.next = 0
        self.seconds: list[float] = []
        self.tokens = 0
        self.failed = 0

    async def ask(self, since: float | None = None) -> None:
        """One request; its time counts from ``since`` if given."""
        number = self.next % len(self.stock)
        text = self.stock[number]
        self.next += 1
        started = time.perf_counter() if since is None else since
        body = {"model": self.model, "input": text, "encoding_format": "float"}
        try:
            async with self.session.post(f"{self.url}/embeddings", json=body) as reply:
                await reply.json()
                if reply.status != 200:
                    self.failed += 1
                    return
        except (aiohttp.ClientError, TimeoutError):
            self.failed += 1
            return
        self.seconds.append(time.perf_counter() - started)
        self.tokens += self.counts[number]

    def result(self, seconds: float) -> dict[str, Any]:
        """Rates and quantiles over a measured stretch."""
        ordered = sorted(self.seconds)

        def quantile(share: float) -> float:
            return (
                round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0
            )

        return {
            "requests_per_second": round(len(ordered) / seconds, 1), "tokens_per_second": round(self.tokens / seconds),
            "p50_ms": quantile(0.5), "p99_ms": quantile(0.99), "requests": len(ordered), "failed": self.failed,
        }  # fmt: skip

    def reset(self) -> None:
        self.seconds, self.tokens, self.failed = [], 0, 0


async def closed(load: Load, clients: int, warm_up: float, seconds: float) -> dict[str, Any]:
    """So many clients, each asking again as soon as it is answered."""
    over = False

    async def client() -> None:
        while not over:
            await load.ask()

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.sleep(warm_up)
    load.reset()
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    result = load.result(time.perf_counter() - started)
    over = True
    await asyncio.gather(*tasks)
    return {"loop": "closed", "clients": clients, **result}


async def opened(load: Load, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at the times of a Poisson process, whether or not earlier ones are answered."""
    draw = random.Random(1)
    started = time.perf_counter()
    at, tasks = started, []
    while at < started + seconds:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(load.ask(at)))
        at += draw.expovariate(rate)
    await asyncio.gather(*tasks)
    return {"loop": "open", "rate": round(rate, 1), **load.result(seconds)}


async def main(options: argparse.Namespace) -> None:
    stock = texts(options.kind, STOCK)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        # Counted beforehand, as servers do not agree on what a token of their usage is.
        counts = (
            json.loads(Path(options.counts).read_text())[options.kind] if options.counts else [0] * len(stock)
        )
        load = Load(session, options.url, options.model, stock, counts)
        if options.rate:
            result = await opened(load, options.rate, options.seconds)
        else:
            result = await closed(load, options.clients, options.warm_up, options.seconds)
    print(json.dumps({"kind": options.kind, **result}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--kind", choices=("short", "mixed"), default="short")
    parser.add_argument("--counts", help="JSON file: tokens of each text, by kind")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: closed loop")
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    sys.exit(asyncio.run(main(parser.parse_args())))
