"""Text generation behind one small protocol, so a stage never knows which engine writes for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from embedloom.config.synthesis import EngineOptions
from embedloom.errors import StageError

ENGINE_FINISHED = "stop"  # the model ended its text itself
ENGINE_CUT = "length"  # the token limit ended it
ENGINE_FAILED = "error"  # there is no text; GenerationResult.error says why


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One text to be written.

    ``messages`` are chat messages (``role``, ``content``); ``seed`` fixes the sampling of this request alone,
    and ``json_schema``, if given, constrains the text to JSON of that shape.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    seed: int
    max_tokens: int
    temperature: float
    top_p: float
    json_schema: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What the engine made of the request with the same id; ``error`` is set when it refused it."""

    id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    error: str | None = None

    @classmethod
    def failed(cls, request: GenerationRequest, error: str, prompt_tokens: int = 0) -> "GenerationResult":
        """The result of a request that got no text."""
        return cls(request.id, "", ENGINE_FAILED, prompt_tokens, 0, error)


class EngineLostError(StageError):
    """The engine died and will not answer again in this process; another process may well serve the same requests."""


class TextEngine(Protocol):
    """Anything that writes texts."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Write one text per request, in the order of the requests; several threads may call at once.

        A request the engine cannot serve (too long, say) gets a result with ``error``; the others are served.

        Raises:
            EngineLostError: the engine died.
        """
        ...


class EngineFactory(Protocol):
    """Builds an engine inside an actor: VLLMEngine itself, or anything with the same arguments."""

    def __call__(
        self, *, model_folder: Path, options: EngineOptions, threads: int, gpu: bool, tensor_parallel: int
    ) -> TextEngine:
        """Load the model; called once per actor."""
        ...
