"""Any OpenAI-compatible ``/v1/embeddings`` server as a teacher, through the ``openai`` client."""

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from embedloom.artefacts import fingerprint
from embedloom.encoder.model import Vectors
from embedloom.encoder.tokenizer import CutTexts
from embedloom.errors import ConfigError, DataError, MissingDependency, StageError, one_line
from embedloom.instructions import Side, Templates
from embedloom.retrieval.unit import unit_vectors

if TYPE_CHECKING:
    import openai

_TOO_LARGE = 413


@dataclass(frozen=True, slots=True)
class EndpointSource:
    """A served model. The key itself never enters this object, a manifest or a log, only its variable's name."""

    name: str
    url: str  # base address, such as http://host:8000/v1
    model: str
    templates: Templates = field(default_factory=Templates)
    api_key_env: str | None = None  # must be set where the actors run; None: the server asks for no key
    batch_size: int = 32  # texts a request
    concurrency: int = 4  # requests in flight
    timeout_seconds: float = 60.0
    max_retries: int = 5
    max_characters: int | None = None  # longer texts are cut, for servers that refuse rather than truncate

    def open(self) -> "EndpointEmbedder":
        """Prepare the client; nothing is sent yet.

        Raises:
            MissingDependency: the ``openai`` package is not installed.
            ConfigError: the key's environment variable is not set.
        """
        return EndpointEmbedder(self)


@dataclass(frozen=True, slots=True)
class _Answer:
    """Vectors in the order of the texts, the tokens they cost, and how many texts the server says it cut."""

    vectors: list[list[float]]
    tokens: int
    truncated: int

    def with_more(self, other: "_Answer") -> "_Answer":
        """This answer, and another's behind it."""
        return _Answer(
            self.vectors + other.vectors, self.tokens + other.tokens, self.truncated + other.truncated
        )


class EndpointEmbedder:
    """A served model behind the ``Embedder`` protocol.

    The client repeats what may pass (408, 409, 429, 5xx, broken connections) with growing pauses, and as long as
    the server's ``Retry-After`` says.
    """

    def __init__(self, source: EndpointSource) -> None:
        if importlib.util.find_spec("openai") is None:
            raise MissingDependency("openai", "openai", f"teacher {source.name!r}")
        import openai

        self._openai = openai
        self._source = source
        self._dimension: int | None = None
        self.cuts = CutTexts()
        self._client = openai.OpenAI(
            base_url=source.url,
            api_key=_key(source),
            timeout=source.timeout_seconds,
            max_retries=source.max_retries,
        )

    @property
    def contract_hash(self) -> str:
        """Hash of model name, templates and cut; the same model moved to another address keeps its hash."""
        source = self._source
        return fingerprint("openai", source.model, source.templates.facts(), source.max_characters, "unit")

    def embed(
        self,
        texts: Sequence[str],
        side: Side,
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> tuple[Vectors, list[int]]:
        """See ``Embedder.embed``; unit vectors.

        The server counts tokens by request, so those of a request are spread evenly over its texts: only their sum
        is exact. It is 0 where the server reports no usage. ``cuts`` counts the texts cut at ``max_characters``, with what
        was left out of them estimated by the others' characters a token, and those that the server says it cut
        (``usage.truncated_items``, as an embedloom endpoint does), with at least one token each; what a server cuts without
        a word cannot be known.

        Raises:
            DataError: an answer without exactly one finite vector of one dimension per text, or texts it refuses.
            ConfigError: the server knows no such model or address, or refuses the key.
            StageError: it cannot be reached, or still fails after the last retry.
        """
        given = [self._text(*row, side=side) for row in zip(texts, task_types, instructions, strict=True)]
        size = self._source.batch_size
        batches = [given[start : start + size] for start in range(0, len(given), size)]
        if not batches:
            return np.empty((0, self._dimension or 0), dtype=np.float32), []
        with ThreadPoolExecutor(self._source.concurrency) as threads:
            answers = list(threads.map(self._request, batches))
        vectors: Vectors = self._stack([vector for answer in answers for vector in answer.vectors])
        tokens = [
            count
            for batch, answer in zip(batches, answers, strict=True)
            for count in _spread(answer.tokens, len(batch))
        ]
        self._count_cuts(texts, given, sum(tokens), sum(answer.truncated for answer in answers))
        return unit_vectors(vectors, self._label), tokens

    @property
    def _label(self) -> str:
        return f"teacher {self._source.name!r} at {self._source.url}"

    def _text(self, text: str, task_type: str, instruction: str | None, *, side: Side) -> str:
        before, after = self._source.templates.around(side, task_type, instruction)
        # The API refuses empty strings; a blank is the shortest text there is.
        return (before + text[: self._source.max_characters] + after) or " "

    def _count_cuts(self, texts: Sequence[str], given: Sequence[str], tokens: int, truncated: int) -> None:
        limit = self._source.max_characters
        beyond = [len(text) - limit for text in texts if limit is not None and len(text) > limit]
        rate = tokens / max(1, sum(map(len, given)))
        left_out = sum(max(1, round(characters * rate)) for characters in beyond) + truncated
        self.cuts.add(CutTexts(len(texts), min(len(texts), len(beyond) + truncated), tokens, left_out))

    def _request(self, texts: list[str]) -> _Answer:
        """What the server answers; a request that is too large for it goes as two."""
        try:
            answer = self._client.embeddings.create(
                model=self._source.model, input=texts, encoding_format="float"
            )
        except self._openai.APIStatusError as error:
            if error.status_code == _TOO_LARGE and len(texts) > 1:
                half = len(texts) // 2
                return self._request(texts[:half]).with_more(self._request(texts[half:]))
            raise self._refusal(error) from error
        except self._openai.APIError as error:
            tries = self._source.max_retries + 1
            raise StageError(
                f"{self._label}: no answer after {tries} tries ({type(error).__name__}: {error})"
            ) from error
        usage = getattr(answer, "usage", None)
        tokens, truncated = (int(getattr(usage, key, 0) or 0) for key in ("prompt_tokens", "truncated_items"))
        return _Answer(self._in_order(getattr(answer, "data", None), len(texts)), tokens, truncated)

    def _in_order(self, data: Any, wanted: int) -> list[list[float]]:
        items = sorted(data or [], key=lambda item: -1 if item.index is None else item.index)
        if [item.index for item in items] != list(range(wanted)):
            seen = [item.index for item in items][:8]
            raise DataError(
                f"{self._label}: answered {len(items)} vectors for {wanted} texts (indices {seen}); "
                "expected one each, with index 0 to n-1"
            )
        if not all(isinstance(item.embedding, list) for item in items):
            raise DataError(
                f"{self._label}: answered vectors that are no lists of numbers, though asked for float"
            )
        return [item.embedding for item in items]

    def _stack(self, vectors: list[list[float]]) -> Vectors:
        sizes = sorted(
            {len(vector) for vector in vectors} | ({self._dimension} if self._dimension else set())
        )
        if len(sizes) != 1:
            raise DataError(f"{self._label}: vectors of dimensions {sizes}; all must have the same")
        self._dimension = sizes[0]
        return np.array(vectors, dtype=np.float32)

    def _refusal(self, error: "openai.APIStatusError") -> Exception:
        status = error.status_code
        said = f"{self._label}: HTTP {status}: {one_line(error.message, 300)}"
        if status in (401, 403):
            return ConfigError(f"{said}; the key is taken from api_key_env: {self._source.api_key_env!r}")
        if status == 404:
            return ConfigError(
                f"{said}; model is {self._source.model!r}, url must end where /embeddings follows"
            )
        if status in (408, 409, 429) or status >= 500:
            return StageError(f"{said}, after {self._source.max_retries + 1} tries")
        return DataError(f"{said}; batch_size and max_characters make requests smaller")


def _key(source: EndpointSource) -> str:
    if source.api_key_env is None:
        return "none"  # given, or the client would send OPENAI_API_KEY to whatever server this is
    key = os.environ.get(source.api_key_env)
    if not key:
        raise ConfigError(
            f"teacher {source.name!r}: the environment variable {source.api_key_env!r} (api_key_env) is not set where "
            "this actor runs"
        )
    return key


def _spread(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers as equal as can be."""
    return [total // parts + (part < total % parts) for part in range(parts)]
