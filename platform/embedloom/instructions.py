"""The prompt contract: the only place where a query or a document becomes model text.

Every stage that embeds a text (mine, train, evaluate, embed, serve) asks the contract of the model it
uses, so a prefix, a BOS token or a length limit cannot drift between training and serving. The contract
lies beside the weights as ``contract.json``; its hash is stamped on vectors, candidates and the endpoint.

The defaults follow llama-embed-nemotron-8b (arXiv 2511.07025 §2): ``Instruct: {task}\\nQuery: {text}`` on
queries, bare documents, and both sides instructed for symmetric tasks.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedloom.errors import DataError
from embedloom.records import TASK_TYPES

CONTRACT_FILE = "contract.json"
NEMOTRON_TEMPLATE = "Instruct: {task}\nQuery: {text}"
PLAIN_TEMPLATE = "{text}"

Side = Literal["query", "document"]
_PLACEHOLDER = re.compile(r"\{(task|text)\}")

# arXiv 2511.07025 §2 and the instructions mteb records for llama-embed-nemotron-8b, by task type.
DEFAULT_INSTRUCTIONS: dict[str, str] = {
    "retrieval": "Given a question, retrieve passages that answer the question",
    "reranking": "Given a question, retrieve passages that answer the question",
    "instruction_reranking": "Given a question, retrieve passages that answer the question",
    "classification": "Classify the given text",
    "multilabel_classification": "Classify the given text",
    "clustering": "Identify the topic or theme of the given text",
    "sts": "Retrieve semantically similar text",
    "pair_classification": "Retrieve semantically similar text",
    "bitext": "Retrieve parallel sentences",
}
# In these task types both texts play the same part, so both carry the instruction.
SYMMETRIC_TASK_TYPES = (
    "classification",
    "multilabel_classification",
    "clustering",
    "sts",
    "pair_classification",
    "bitext",
)


class PromptContract(BaseModel):
    """How one model wants its texts; immutable, hashed, stored beside the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    template: str = NEMOTRON_TEMPLATE
    instructions: dict[str, str] = Field(default_factory=lambda: dict(DEFAULT_INSTRUCTIONS))
    symmetric_task_types: tuple[str, ...] = SYMMETRIC_TASK_TYPES
    add_bos: bool = True
    add_eos: bool = False
    max_query_tokens: int = Field(default=512, ge=8)
    max_document_tokens: int = Field(default=512, ge=8)
    padding_side: Literal["left", "right"] = "right"
    pooling: Literal["mean", "cls", "last_token"] = "mean"
    normalize: bool = True
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    # Lengths that a prefix of a vector was trained for (Matryoshka, arXiv 2205.13147); None: only the whole.
    matryoshka_dimensions: tuple[int, ...] | None = None

    @property
    def hash(self) -> str:
        """Sixteen hex digits over every field; equal contracts make comparable vectors of one model."""
        canonical = json.dumps(self._fields(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def _fields(self) -> dict[str, object]:
        """What is hashed and stored; a field that states nothing is left out, so that older hashes stay valid."""
        return self.model_dump(mode="json", exclude_none=True)

    def instruction_for(self, task_type: str, instruction: str | None = None) -> str:
        """The given instruction, or the contract's own for the task type.

        Raises:
            DataError: unknown task type.
        """
        if instruction:
            return instruction
        if task_type not in self.instructions:
            raise DataError(f"task_type: {task_type!r} is unknown; allowed: {sorted(self.instructions)}")
        return self.instructions[task_type]

    def format(
        self, text: str, side: Side, task_type: str = "retrieval", instruction: str | None = None
    ) -> str:
        """Model text of one query or document.

        A document stays bare unless the task type is symmetric (STS, classification, ...).
        """
        if side == "document" and task_type not in self.symmetric_task_types:
            return text
        values = {"task": self.instruction_for(task_type, instruction), "text": text}
        return _PLACEHOLDER.sub(lambda match: values[match.group(1)], self.template)

    def max_tokens(self, side: Side) -> int:
        """Token limit of one side, special tokens included."""
        return self.max_query_tokens if side == "query" else self.max_document_tokens

    def save(self, folder: Path) -> None:
        """Write ``contract.json`` into a model folder."""
        document = {**self._fields(), "hash": self.hash}
        (folder / CONTRACT_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "PromptContract":
        """Read and verify ``contract.json``.

        Raises:
            DataError: missing, malformed, or edited without its hash.
        """
        path = folder / CONTRACT_FILE
        if not path.is_file():
            raise DataError(f"{path}: missing; every embedloom model folder carries its prompt contract")
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, where: str) -> "PromptContract":
        """Verify the content of a ``contract.json``; ``where`` names it in errors.

        Raises:
            DataError: malformed, or edited without its hash.
        """
        try:
            stored = json.loads(content)
            stated_hash = stored.pop("hash", None)
            contract = cls.model_validate(stored)
        except (ValueError, AttributeError, ValidationError) as error:
            raise DataError(f"{where}: not a prompt contract: {error}") from error
        if stated_hash not in (None, contract.hash):
            raise DataError(
                f"{where}: hash is {stated_hash}, its fields hash to {contract.hash}; it was edited by hand"
            )
        return contract


def document_text(title: str | None, text: str) -> str:
    """Text of a document record: title and body joined by a blank, as BEIR and the NeMo miner do."""
    return f"{title} {text}".strip() if title else text.strip()


def check_task_type(task_type: str, where: str) -> str:
    """Return the task type, or raise DataError naming ``where`` it stood."""
    if task_type not in TASK_TYPES:
        raise DataError(f"{where}: task_type {task_type!r} is unknown; allowed: {list(TASK_TYPES)}")
    return task_type
