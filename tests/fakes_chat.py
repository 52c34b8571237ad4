"""A local server that answers ``/v1/chat/completions`` as it is told to: FastAPI on uvicorn, in a thread."""

import asyncio
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fakes_engines import fake_value

Behaviour = Callable[["ChatServer", dict[str, Any], str], Response | None]


@dataclass
class ChatServer:
    """What the server was asked, and how it shall answer.

    ``behaviour`` is asked first with (server, body, key) and answers itself where it returns a response; ``seconds`` is what an
    answer takes; ``capacity`` in flight at once, above which it answers 429.
    """

    behaviour: Behaviour = lambda server, body, key: None
    seconds: float = 0.0
    capacity: int = 10**6
    retry_after: str | None = None
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)  # by idempotency key
    answered: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    prompt_tokens: int = 100
    output_tokens: int = 20

    @property
    def total_tokens(self) -> tuple[int, int]:
        """Prompt and answer tokens of what was answered."""
        answers = sum(self.answered.values())
        return answers * self.prompt_tokens, answers * self.output_tokens

    async def answer(self, request: Request) -> Response:
        body, key = await request.json(), request.headers.get("idempotency-key", "")
        self.asked[key] += 1
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.in_flight >= self.capacity:
            headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
            return JSONResponse({"error": {"message": "slow down"}}, 429, headers)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if (own := self.behaviour(self, body, key)) is not None:
                return own
            await asyncio.sleep(self.seconds)
            return self.written(body, key)
        finally:
            self.in_flight -= 1

    def written(self, body: dict[str, Any], key: str) -> Response:
        """JSON of the schema that is asked for, drawn by the seed."""
        schema = body["response_format"]["json_schema"]["schema"]
        text = json.dumps(fake_value(schema, random.Random(body.get("seed", 1))))
        self.answered[key] += 1
        return completion(text, "stop", self.prompt_tokens, self.output_tokens)


def completion(
    content: str | None, finish: str = "stop", prompt: int = 100, output: int = 20
) -> JSONResponse:
    """An answer as the API has it."""
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return JSONResponse(
        {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}
    )  # fmt: skip


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> JSONResponse:
    """An error as the API has it."""
    return JSONResponse({"error": {"message": message, "code": code}}, status, headers or None)


def half_an_answer() -> Response:
    """A body that ends in the middle."""
    whole = completion('{"query": "half"}').body
    return Response(whole[: len(whole) // 2], media_type="application/json")


def in_turn(*answers: Callable[[], Response | None]) -> Behaviour:
    """These answers first, in order; then the server's own."""
    left, lock = list(answers), threading.Lock()

    def next_one(server: ChatServer, body: dict[str, Any], key: str) -> Response | None:
        with lock:
            return left.pop(0)() if left else None

    return next_one


@contextmanager
def chat_server(**settings: Any) -> Iterator[ChatServer]:
    """A server that runs while the block does."""
    state = ChatServer(**settings)
    app = FastAPI()
    app.post("/v1/chat/completions")(state.answer)
    listener = socket.create_server(("127.0.0.1", 0))
    state.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield state
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
