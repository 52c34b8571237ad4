"""What turns texts into vectors, whichever library or server runs the model, and how actors of a node share its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embedloom.compute.shards import Weights, elsewhere, reserved
from embedloom.config.cluster import PoolConfig
from embedloom.core.prompting import PromptContract, Side
from embedloom.encoder.backbone import DTypeName, SharedWeights, stored_weights
from embedloom.encoder.model import Encoder, Vectors
from embedloom.encoder.registry import NodeModel, fetched_by_name, open_model
from embedloom.encoder.tokenizer import CutTexts, InstructionTooLong
from embedloom.retrieval.search import check_vectors
from embedloom.retrieval.tokenizing import EncoderTokenizer, Tokenizer

# Vectors of length 1, whose inner product is the cosine.


def unit_vectors(vectors: Any, source: str) -> Vectors:
    """The same directions at length 1: float32 [n, d], divided in float64.

    Args:
        vectors: [n, d], any float type.
        source: what they are, named in the error.

    Raises:
        DataError: a zero, NaN or infinite vector.
    """
    given: Vectors = np.asarray(vectors, dtype=np.float32)
    check_vectors(given, source)
    wide = given.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True), dtype=np.float32)


class Embedder(Protocol):
    """A loaded model; lives inside one actor."""

    @property
    def contract_hash(self) -> str:
        """What the texts went through; vectors of different hashes are never compared."""
        ...

    def embed(
        self,
        texts: Sequence[str],
        side: Side,
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> tuple[Vectors, list[int]]:
        """Vectors float32 [len(texts), d] and the tokens each text cost.

        Args:
            texts: raw texts.
            side: whether they are queries or documents.
            task_types: one per text; decides the default instruction and whether a document carries one.
            instructions: one per text, None for the contract's own.
        """
        ...


def taken_cuts(embedder: Embedder) -> CutTexts:
    """What an embedder's limits left out since it was last asked; of one that cannot tell, nothing."""
    cuts = getattr(embedder, "cuts", None)
    return CutTexts() if cuts is None else cuts.take()


class TokenEmbedder(Embedder, Protocol):
    """An embedder that also takes texts that were tokenized elsewhere."""

    def embed_tokens(self, token_ids: Sequence[Sequence[int]]) -> Vectors:
        """Vectors float32 [len(token_ids), d]; several threads may call it at once."""
        ...


class EmbedderSource(Protocol):
    """Where an embedder comes from: small and picklable, opened once in every actor."""

    @property
    def name(self) -> str:
        """Stamped on the vectors."""
        ...

    def open(self) -> Embedder:
        """Load the model."""
        ...


@runtime_checkable
class SplitSource(EmbedderSource, Protocol):
    """A source whose texts can be tokenized on one machine while the model computes on another."""

    def open(self) -> TokenEmbedder:
        """Load the model."""
        ...

    def open_tokenizer(self) -> Tokenizer:
        """Load what tokenizes, without the weights."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderSource:
    """One of our model folders, or a foreign one whose contract can be derived."""

    name: str
    folder: Path | NodeModel
    contract: PromptContract | None = None  # replaces the folder's own, such as other length limits
    dtype: DTypeName = "auto"

    def open(self) -> "EncoderEmbedder":
        """Load the encoder."""
        return EncoderEmbedder(Encoder.load(self.folder, dtype=self.dtype, contract=self.contract), self.name)

    def open_tokenizer(self) -> EncoderTokenizer:
        """Load tokenizer and contract."""
        return EncoderTokenizer(open_model(self.folder), self.contract, self.name)


class EncoderEmbedder:
    """Our encoder behind the protocol."""

    def __init__(self, encoder: Encoder, name: str = "encoder") -> None:
        self.encoder = encoder
        self._name = name

    @property
    def cuts(self) -> CutTexts:
        """What the limits left out so far."""
        return self.encoder.cuts

    @property
    def contract_hash(self) -> str:
        """Hash of the encoder's prompt contract."""
        return self.encoder.contract.hash

    def embed(
        self,
        texts: Sequence[str],
        side: Side,
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> tuple[Vectors, list[int]]:
        """See ``Embedder.embed``.

        Raises:
            InstructionTooLong: a text of which an instruction leaves next to nothing.
        """
        try:
            token_ids = self.encoder.tokenize(texts, side, task_types, instructions)
        except InstructionTooLong as error:
            raise InstructionTooLong(f"model {self._name!r}: {error}") from error
        return self.embed_tokens(token_ids), [len(ids) for ids in token_ids]

    def embed_tokens(self, token_ids: Sequence[Sequence[int]]) -> Vectors:
        """See ``TokenEmbedder.embed_tokens``."""
        return self.encoder.embed_tokens(token_ids)


def count_prefetched(embedder: Embedder, asked: Sequence[tuple[str, str, str | None]], side: Side) -> None:
    """Count what the limits leave out of texts that are not embedded here, as their vectors were prefetched.

    Tokenizes them once more. Known of our own encoder alone: other teachers' prefetched texts are not counted.

    Args:
        embedder: whose ``cuts`` count.
        asked: text, task type and instruction of each.
        side: whether they are queries or documents.
    """
    if asked and isinstance(embedder, EncoderEmbedder):
        texts, task_types, instructions = zip(*asked, strict=True)
        embedder.encoder.tokenize(texts, side, task_types, instructions)


def weights_of(source: object) -> Weights:
    """What fetches the model of a source, or of a pair scorer's, where it is called; nothing of an endpoint or a plain folder."""
    folder = getattr(source, "folder", None)
    return () if folder is None else elsewhere(fetched_by_name(folder))


# One copy of an encoder's weights per node: they lie in Ray's object store, and every actor maps them.


@dataclass(frozen=True, slots=True)
class SharedEncoderSource:
    """An encoder whose weights are in the object store; they stay there as long as this object lives."""

    name: str
    folder: Path | NodeModel
    contract: PromptContract | None
    weights: Any  # ray.ObjectRef of SharedWeights; ray ships no types
    dtype: DTypeName = "auto"  # where the weights leave it open

    def open(self) -> EncoderEmbedder:
        """Build the encoder over the mapped arrays; on a GPU, which has a copy of its own, they are let go again.

        Raises:
            DataError: the task that read the weights could not.
        """
        import ray

        try:
            weights = ray.get(self.weights)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        encoder = Encoder.load(self.folder, dtype=self.dtype, contract=self.contract, weights=weights)
        return EncoderEmbedder(encoder, self.name)


_READER_RETRIES = 3  # of nodes that are lost; with them goes the copy, and Ray reads again


def read_stored(folder: Path | NodeModel, contract: PromptContract | None) -> SharedWeights:
    """The weights of an encoder as its files hold them; in a task, whose process takes the loader's memory with it.

    Raises:
        DataError: a model that cannot be loaded.
    """
    model = open_model(folder)
    return stored_weights(model.transformer, (contract or model.contract).attention)


def share_weights(source: EmbedderSource, pool: PoolConfig) -> EmbedderSource:
    """Put an encoder's weights into the object store, if several actors are to have them: files are read once.

    For actors on CPU the driver loads the model, and ``dtype: auto`` is decided by its CPU for all. For actors with GPUs a task
    does, where an actor would run and before there is one; nodes get their host copy from it, not from the storage.

    Args:
        source: what the pool's actors would open.
        pool: a single actor keeps its source.

    Returns:
        What the actors open instead.
    """
    if not isinstance(source, EncoderSource) or pool.max_actors == 1:
        return source
    import ray

    if pool.gpus:
        reader = ray.remote(max_calls=1, max_retries=_READER_RETRIES)(read_stored).options(**reserved(pool))
        weights = reader.remote(source.folder, source.contract)
        return SharedEncoderSource(source.name, source.folder, source.contract, weights, source.dtype)
    encoder = Encoder.load(source.folder, dtype=source.dtype, device="cpu", contract=source.contract)
    return SharedEncoderSource(source.name, source.folder, source.contract, ray.put(encoder.share_weights()))
