"""A deterministic encoder without weights, and clients' bodies, for serving tests."""

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from embedloom.instructions import PromptContract, Side

DIMENSION = 8
VOCABULARY = 300
BOS = 1


class CharacterTokenizer:
    """BOS and one token a character, so token counts can be worked out by hand."""

    def __call__(
        self, texts: list[str], truncation: bool = False, max_length: int | None = None, padding: bool = False
    ) -> Any:
        ids = [[BOS, *(3 + ord(character) % (VOCABULARY - 3) for character in text)] for text in texts]
        return {"input_ids": [item[:max_length] for item in ids] if truncation else ids}


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
