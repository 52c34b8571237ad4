"""From texts to the ids that a model computes, on machines where the model is not."""

import pickle
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from embedloom.core.model_folder import ModelFolder
from embedloom.core.prompting import PromptContract, Side
from embedloom.encoder.tokenizer import CutTexts, InstructionTooLong, contract_ids, load_tokenizer


class Tokenizer(Protocol):
    """What an embedder makes of texts before its model sees them; ``cuts`` counts what its limits leave out."""

    cuts: CutTexts

    def tokenize(
        self,
        texts: Sequence[str],
        side: Side,
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> Sequence[Sequence[int]]:
        """Token ids of each text; arguments as ``Embedder.embed`` has them."""
        ...


class EncoderTokenizer:
    """What our encoder makes of texts, without its weights."""

    def __init__(self, model: ModelFolder, contract: PromptContract | None, name: str = "encoder") -> None:
        self.tokenizer = load_tokenizer(model.transformer)
        self.contract = model.contract if contract is None else contract
        self.cuts = CutTexts()
        self._name = name

    def tokenize(
        self,
        texts: Sequence[str],
        side: Side,
        task_types: Sequence[str],
        instructions: Sequence[str | None],
    ) -> list[list[int]]:
        """See ``Tokenizer.tokenize``.

        Raises:
            InstructionTooLong: a text of which an instruction leaves next to nothing.
        """
        try:
            return contract_ids(
                self.tokenizer, self.contract, texts, side, task_types, instructions, self.cuts
            )
        except InstructionTooLong as error:
            raise InstructionTooLong(f"model {self._name!r}: {error}") from error


@lru_cache(maxsize=2)
def opened_tokenizer(source: bytes) -> Tokenizer:
    """The tokenizer of a pickled ``SplitSource``, once in a process: one of 128,000 tokens takes a second to load."""
    found: Any = pickle.loads(source)
    tokenizer: Tokenizer = found.open_tokenizer()
    return tokenizer
