"""A deterministic encoder without weights, and clients' bodies, for serving tests."""

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.testclient import TestClient

from embedloom.core.prompting import PromptContract, Side
from embedloom.serving.api import create_api
from embedloom.serving.calls import EndpointSettings
from embedloom.serving.schemas import ErrorResponse
from embedloom.serving.service import BatchSettings, EncoderService

DIMENSION = 8
VOCABULARY = 300
BOS = 1


class CharacterTokenizer:
    """BOS and one token a character, so token counts can be worked out by hand."""

    all_special_ids = (BOS,)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<s>" if one == BOS else f"#{one}" for one in ids]

    def __call__(
        self,
        texts: list[str],
        truncation: bool = False,
        max_length: int | None = None,
        padding: bool = False,
        return_offsets_mapping: bool = False,
    ) -> Any:
        ids = [[BOS, *(3 + ord(character) % (VOCABULARY - 3) for character in text)] for text in texts]
        encoded: dict[str, Any] = {"input_ids": [item[:max_length] for item in ids] if truncation else ids}
        if return_offsets_mapping:
            encoded["offset_mapping"] = [[(0, 0), *((n, n + 1) for n in range(len(text)))] for text in texts]
        return encoded


def vector_of(ids: Sequence[int]) -> np.ndarray:
    """Unit vector that depends on every token and its place, and on nothing else."""
    generator = np.random.default_rng([len(ids), *ids])
    vector = generator.standard_normal(DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector)


class FakeEncoder:
    """What serving needs of an encoder; remembers its batches."""

    def __init__(
        self, *, delay_seconds: float = 0.0, matryoshka: list[int] | None = None, limit: int = 64
    ) -> None:
        self.contract = PromptContract(max_query_tokens=limit, max_document_tokens=limit)
        self.tokenizer = CharacterTokenizer()
        self.backbone = SimpleNamespace(
            config=SimpleNamespace(vocab_size=VOCABULARY, matryoshka_dimensions=matryoshka)
        )
        self.dimension = DIMENSION
        self.batches: list[list[list[int]]] = []
        self.delay_seconds = delay_seconds
        self.failure: Exception | None = None
        self.gate = threading.Event()  # clear it to hold the encoder in its first batch
        self.gate.set()

    def tokenize(
        self, texts: Sequence[str], side: Side, task_type: str = "retrieval", instruction: str | None = None
    ) -> list[list[int]]:
        formatted = [self.contract.format(text, side, task_type, instruction) for text in texts]
        return self.tokenizer(formatted, truncation=True, max_length=self.contract.max_tokens(side))[
            "input_ids"
        ]

    def embed_tokens(self, token_ids: Sequence[Sequence[int]], max_batch_tokens: int = 4096) -> np.ndarray:
        self.batches.append([list(ids) for ids in token_ids])
        self.gate.wait(10)
        time.sleep(self.delay_seconds)
        if self.failure is not None:
            raise self.failure
        return np.stack([vector_of(ids) for ids in token_ids])

    def embed(
        self, texts: Sequence[str], side: Side, task_type: str = "retrieval", instruction: str | None = None
    ) -> np.ndarray:
        return np.stack([vector_of(ids) for ids in self.tokenize(texts, side, task_type, instruction)])


def service_of(encoder: FakeEncoder, **limits: Any) -> EncoderService:
    values = {"max_batch_tokens": 256, "batch_wait_seconds": 0.0, **limits}
    return EncoderService(encoder, BatchSettings(**values), fingerprint="f00d")


def settings_of(**settings: Any) -> EndpointSettings:
    values = {
        "served_name": "tiny", "fingerprint": "f00d", "created": 1_700_000_000, "max_items": 8, "max_requests": 4,
        "request_timeout_seconds": 10.0, **settings,
    }  # fmt: skip
    return EndpointSettings(**values)


def api_of(
    encoder: FakeEncoder,
    *,
    limits: dict[str, Any] | None = None,
    corpus: Any = None,
    desk: Any = None,
    **settings: Any,
) -> FastAPI:
    return create_api(
        service_of(encoder, **(limits or {})), settings_of(**settings), corpus=corpus, desk=desk
    )


def client_of(encoder: FakeEncoder, **options: Any) -> TestClient:
    return TestClient(api_of(encoder, **options), raise_server_exceptions=False)


def refused(reply: Any, status: int) -> dict[str, Any]:
    """The error of a reply that must be a refusal in OpenAI's shape."""
    assert reply.status_code == status, reply.text
    ErrorResponse.model_validate(reply.json(), strict=True)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    return reply.json()["error"]
