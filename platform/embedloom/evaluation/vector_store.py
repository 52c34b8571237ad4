"""Vectors of texts on disk, one file a shard: what one model embedded once serves every task that has the text.

A folder belongs to one model, one prompt contract and one compute type; a file is written whole or not at all, and
its name is the hash of the texts in it, so a killed evaluation finds what it finished and trusts nothing else.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from embedloom.encoder.model import Vectors
from embedloom.encoder.tokenizer import CutTexts
from embedloom.errors import DataError
from embedloom.instructions import PromptContract, Side
from embedloom.storage import Place

Keys = np.ndarray[Any, np.dtype[np.uint64]]  # [texts, 2]: 128 bits a text
_KEY_BYTES = 16


def text_keys(
    contract: PromptContract,
    task_type: str,
    texts: Sequence[str],
    sides: Sequence[Side],
    instructions: Sequence[str | None],
) -> Keys:
    """Hash of each text as the model reads it: formatted by the contract, with the side's token limit."""
    digests = bytearray()
    for text, side, instruction in zip(texts, sides, instructions, strict=True):
        formatted = contract.format(text, side, task_type, instruction)
        content = f"{contract.max_tokens(side)}\0{formatted}".encode()
        digests += hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()
    return np.frombuffer(bytes(digests), dtype=np.uint64).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class VectorStore:
    """The folder of one model."""

    place: Place

    def has(self, shard: str) -> bool:
        """Whether a shard is there."""
        return self.place.exists(_file(shard))

    def write(
        self, shard: str, keys: Keys, vectors: Vectors, tokens: int, padded: int, cuts: CutTexts | None = None
    ) -> None:
        """Store a shard with what it cost, and what the limits left out of its texts."""
        stream = io.BytesIO()
        cut = np.array(astuple(cuts or CutTexts()))
        np.savez(stream, keys=keys, vectors=vectors, tokens=np.array([tokens, padded]), cut=cut)
        self.place.write_bytes(_file(shard), stream.getvalue())

    def cost(self, shard: str) -> tuple[int, int]:
        """Tokens and padded tokens of a shard."""
        tokens, padded = self._load(shard)["tokens"]
        return int(tokens), int(padded)

    def cuts(self, shard: str) -> CutTexts:
        """What the limits left out of a shard's texts; nothing is known of one that an earlier version wrote."""
        content = self._load(shard)
        return CutTexts(*map(int, content["cut"])) if "cut" in content else CutTexts()

    def read(self, shards: Sequence[str]) -> "VectorTable":
        """All vectors of some shards."""
        loaded = [self._load(shard) for shard in shards]
        if not loaded:
            return VectorTable(np.empty((0, 2), dtype=np.uint64), np.empty((0, 0), dtype=np.float32))
        return VectorTable(
            np.concatenate([content["keys"] for content in loaded]),
            np.concatenate([content["vectors"] for content in loaded]),
        )

    def _load(self, shard: str) -> Any:
        content = self.place.read_bytes(_file(shard))
        try:
            return np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, OSError) as error:
            raise DataError(
                f"{self.place.uri}/{_file(shard)}: not a shard of vectors ({error}); delete it"
            ) from error


class VectorTable:
    """Vectors by key."""

    def __init__(self, keys: Keys, vectors: Vectors) -> None:
        order = np.argsort(keys[:, 0], kind="stable")
        self._high, self._low = keys[order, 0], keys[order, 1]
        self._vectors = vectors[order]

    def look_up(self, keys: Keys) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Vectors]:
        """Which keys are known (bool [n]), and the vectors of those, in order."""
        if not len(self._high):
            return np.zeros(len(keys), dtype=bool), self._vectors
        place = np.minimum(np.searchsorted(self._high, keys[:, 0]), len(self._high) - 1)
        # Two texts that share the first 64 bits but not the rest count as unknown: slower, never wrong.
        known = (self._high[place] == keys[:, 0]) & (self._low[place] == keys[:, 1])
        return known, self._vectors[place[known]]


def shard_id(keys: Keys) -> str:
    """Name of a shard: sixteen hex digits over its keys, in order."""
    return hashlib.blake2b(np.ascontiguousarray(keys).tobytes(), digest_size=8).hexdigest()


def _file(shard: str) -> str:
    return f"{shard}.npz"
