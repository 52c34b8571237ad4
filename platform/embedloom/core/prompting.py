r"""The only place where a query, a document or a label becomes model text.

Every stage that embeds a text (mine, train, evaluate, embed, serve) asks the contract of the model it
uses, so a prefix, a BOS token or a length limit cannot drift between training and serving. The contract
lies beside the weights as ``contract.json``; its hash is stamped on vectors, candidates and the endpoint. A
foreign teacher or cross-encoder has ``Templates`` instead. Which texts carry an instruction is decided by
``is_instructed`` and ``opposite_task_type`` for both.

The defaults follow llama-embed-nemotron-8b (arXiv 2511.07025 §2): ``Instruct: {task}\nQuery: {text}`` on
queries, bare documents, and both sides instructed for symmetric tasks.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from embedloom.core.schemas import TASK_TYPES
from embedloom.errors import DataError

CONTRACT_FILE = "contract.json"
NEMOTRON_TEMPLATE = "Instruct: {task}\nQuery: {text}"
PLAIN_TEMPLATE = "{text}"
# What one vector is made of token states by; several joined by "+" are put behind one another.
POOLINGS = ("mean", "cls", "last_token", "max", "mean_sqrt_len", "weighted_mean")

Side = Literal["query", "document"]
_MARK = "\0"  # stands for the text; no instruction of ours holds one
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
# In these a text stands opposite the name of a class.
LABEL_TASK_TYPES = ("classification", "multilabel_classification")
# What a request that names no task is taken for, unless the contract says otherwise.
USUAL_TASK = "retrieval"


def is_instructed(
    side: Side, task_type: str, symmetric_task_types: Collection[str] = SYMMETRIC_TASK_TYPES
) -> bool:
    """Whether texts of a side carry the instruction: queries, and documents that play the same part as queries."""
    return side == "query" or task_type in symmetric_task_types


def opposite_task_type(task_type: str) -> str:
    """The task type by which the documents of a pair become model text.

    In classification that is not its own: a text to classify carries the instruction on either side, but what stands
    opposite it in a pair is a label, and bare as a passage is (arXiv 2511.07025 §3.1).
    """
    return USUAL_TASK if task_type in LABEL_TASK_TYPES else task_type


class NamedTask(BaseModel):
    """A prompt that a model knows by name: one that it was trained with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task_type: str
    instruction: str
    # Before its documents; null: by the task type (the instruction in a symmetric one, else none); "": none.
    document_instruction: str | None = None
    share: float | None = None  # of all queries trained; it tells and decides nothing, so no hash counts it


def pooling_modes(pooling: str) -> list[str]:
    """The modes that a pooling such as ``cls+mean`` consists of.

    Raises:
        ValueError: one is unknown.
    """
    modes = pooling.split("+")
    for mode in modes:
        if mode not in POOLINGS:
            raise ValueError(f"pooling: {pooling!r} is unknown; allowed: {', '.join(POOLINGS)}")
    return modes


class PromptContract(BaseModel):
    """How one model wants its texts; immutable, hashed, stored beside the weights.

    A task is a task type, whose prompt is the contract's default, or the name of one of ``tasks``.
    """

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
    pooling: str = "mean"  # one of POOLINGS, or several joined by "+"
    normalize: bool = True
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    # What some models put around documents, and around both texts where they play the same part; None: documents
    # stay bare, and symmetric task types take ``template``.
    document_template: str | None = None
    symmetric_template: str | None = None
    # Lengths that a prefix of a vector was trained for (Matryoshka, arXiv 2205.13147); None: only the whole.
    matryoshka_dimensions: tuple[int, ...] | None = None
    # By task type, what stands before documents where it is not what ``symmetric_task_types`` says; "": nothing.
    document_instructions: dict[str, str] | None = None
    tasks: dict[str, NamedTask] | None = None  # prompts that the model was trained with, by name
    default_task: str | None = None  # of texts that come without a task; null: retrieval

    @model_validator(mode="after")
    def _tasks_are_told_apart(self) -> "PromptContract":
        for name, task in (self.tasks or {}).items():
            if name in TASK_TYPES or task.task_type not in TASK_TYPES:
                raise ValueError(
                    f"tasks.{name}: a task type cannot be a name, and its own task_type {task.task_type!r} must be "
                    f"one of {list(TASK_TYPES)}"
                )
        if self.default_task is not None and not self.knows(self.default_task):
            raise ValueError(f"default_task: {self.default_task!r}; allowed: {self.known_tasks}")
        return self

    @field_validator("pooling")
    @classmethod
    def _known_pooling(cls, value: str) -> str:
        pooling_modes(value)
        return value

    @property
    def hash(self) -> str:
        """Sixteen hex digits over all that decides model text; equal ones make comparable vectors of one model."""
        fields = self._fields()
        fields.pop("tasks", None)
        if named := self._other_prompts():
            fields["tasks"] = named
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def _other_prompts(self) -> dict[str, object]:
        """The named tasks that say another thing than the default of their type, without their shares."""
        return {
            name: task.model_dump(mode="json", exclude={"share"}, exclude_none=True)
            for name, task in (self.tasks or {}).items()
            if not self.is_default(name)
        }

    def _fields(self) -> dict[str, object]:
        """What is hashed and stored; a field that states nothing is left out, so that older hashes stay valid."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def known_tasks(self) -> list[str]:
        """What a task may be: every task type, then the named tasks."""
        return [*sorted({*self.instructions}), *(self.tasks or {})]

    def knows(self, task: str) -> bool:
        """Whether a task is a task type or one of the named tasks."""
        return task in TASK_TYPES or task in self.instructions or task in (self.tasks or {})

    def task_type_of(self, task: str | None = None) -> str:
        """The task type of a task; of None, of the default task.

        Raises:
            DataError: unknown task.
        """
        task = task or self.default_task or USUAL_TASK
        if not self.knows(task):
            raise DataError(f"task: {task!r} is unknown; allowed: {self.known_tasks}")
        named = (self.tasks or {}).get(task)
        return named.task_type if named is not None else task

    def is_default(self, name: str) -> bool:
        """Whether a named task's prompts are those that its task type has by default."""
        kind = self.task_type_of(name)
        return all(self.prompt(side, name) == self.prompt(side, kind) for side in ("query", "document"))

    def instruction_for(self, task: str | None = None, instruction: str | None = None) -> str:
        """The given instruction, or the contract's own for the task.

        Args:
            task: a task type or the name of a task; None: the default task.
            instruction: in place of the contract's own.

        Raises:
            DataError: unknown task.
        """
        if instruction:
            return instruction
        kind = self.task_type_of(task)
        named = (self.tasks or {}).get(task or self.default_task or USUAL_TASK)
        if named is not None:
            return named.instruction
        if kind not in self.instructions:
            raise DataError(f"task: {kind!r} is unknown; allowed: {self.known_tasks}")
        return self.instructions[kind]

    def prompt(self, side: Side, task: str | None = None, instruction: str | None = None) -> str | None:
        """The instruction that stands before a text of this side; None: the text stays as it is.

        Arguments and errors as of ``format``.
        """
        kind = self.task_type_of(task)
        if side == "query":
            return self.instruction_for(task, instruction)
        named = (self.tasks or {}).get(task or self.default_task or USUAL_TASK)
        stated = (
            named.document_instruction if named is not None else (self.document_instructions or {}).get(kind)
        )
        if stated is not None:
            return stated or None
        instructed = is_instructed(side, kind, self.symmetric_task_types)
        return self.instruction_for(task, instruction) if instructed else None

    def format(self, text: str, side: Side, task: str | None = None, instruction: str | None = None) -> str:
        """Model text of one query or document.

        A document stays bare unless the task type is symmetric (STS, clustering, ...), or the contract says what
        stands before the documents of the task.

        Args:
            text: as it came.
            side: query or document.
            task: a task type or the name of a task; None: the default task.
            instruction: of the query, and of the document in a symmetric task type; None: the contract's own.

        Raises:
            DataError: unknown task.
        """
        template = self._stated_template(side, self.task_type_of(task))
        if template is not None:
            return template.replace("{text}", text, 1)
        prompt = self.prompt(side, task, instruction)
        if prompt is None:
            return text
        values = {"task": prompt, "text": text}
        return _PLACEHOLDER.sub(lambda match: values[match.group(1)], self.template)

    def format_opposite(self, text: str, task_type: str, instruction: str | None, stated: str | None) -> str:
        """Model text of what stands opposite a query in a pair; arguments and errors as of ``opposite_prompt``."""
        prompt = self.opposite_prompt(task_type, instruction, stated)
        if prompt:
            return self.format(text, "query", task_type, prompt)
        # A label is no document, and of texts that play the same part the pair says what stands before them.
        is_document = (
            task_type not in self.symmetric_task_types and opposite_task_type(task_type) == task_type
        )
        template = self.document_template if is_document else None
        return text if template is None else template.replace("{text}", text, 1)

    def opposite_prompt(self, task_type: str, instruction: str | None, stated: str | None) -> str | None:
        """The instruction before a passage, a label or a text that stands opposite a query in a pair; None: it is bare.

        Args:
            task_type: of the pair.
            instruction: of its query; None: the contract's own.
            stated: what the pair says of its documents: an instruction; None: they are bare; "": nothing.

        Raises:
            DataError: unknown task type.
        """
        if stated:
            return stated
        if stated is None or opposite_task_type(task_type) != task_type:
            return None
        return self.prompt("document", task_type, instruction)

    def _stated_template(self, side: Side, kind: str) -> str | None:
        """A foreign model's own template for documents or for texts that play the same part, where it has one."""
        if kind in self.symmetric_task_types:
            return self.symmetric_template
        return self.document_template if side == "document" else None

    def text_before(self, side: Side, task: str | None = None) -> str:
        """What ``format`` puts before a text, all that readers with a list of prompts can say of the template."""
        return self.format(_MARK, side, task).split(_MARK)[0]

    def max_tokens(self, side: Side) -> int:
        """Token limit of one side, special tokens included."""
        return self.max_query_tokens if side == "query" else self.max_document_tokens

    def save(self, folder: Path) -> None:
        """Write ``contract.json`` into a model folder."""
        (folder / CONTRACT_FILE).write_bytes(self.as_file())

    def as_file(self) -> bytes:
        """Content of ``contract.json``."""
        document = {**self._fields(), "hash": self.hash}
        return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

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


@dataclass(frozen=True, slots=True)
class Templates:
    """What stands around a text before a foreign teacher or cross-encoder reads it.

    Templates of queries and documents with ``{text}`` once and, optionally, ``{instruction}``.

    In symmetric task types (STS, classification, ...) both texts play the same part, so documents take the query
    template too, as E5, e5-mistral and Qwen3-Embedding ask for in their model cards; both take ``symmetric`` where that
    is stated.
    """

    query: str = PLAIN_TEMPLATE
    document: str = PLAIN_TEMPLATE
    instructions: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_INSTRUCTIONS))
    symmetric_task_types: tuple[str, ...] = SYMMETRIC_TASK_TYPES
    symmetric: str | None = None

    def around(self, side: Side, task_type: str, instruction: str | None) -> tuple[str, str]:
        """What stands before and after the text.

        Args:
            side: whether it is a query or a document.
            task_type: decides the default instruction, and whether a document is written as a query.
            instruction: None or empty for the default of the task type.

        Raises:
            DataError: no instruction, and none known for the task type.
        """
        template = self.query if is_instructed(side, task_type, self.symmetric_task_types) else self.document
        if self.symmetric is not None and task_type in self.symmetric_task_types:
            template = self.symmetric
        before, _, after = template.partition("{text}")
        if "{instruction}" not in before + after:
            return before, after
        if not instruction and task_type not in self.instructions:
            raise DataError(f"task_type: {task_type!r} is unknown; allowed: {sorted(self.instructions)}")
        own = instruction or self.instructions[task_type]
        return before.replace("{instruction}", own), after.replace("{instruction}", own)

    def facts(self) -> dict[str, Any]:
        """Everything that shapes a text, for a contract hash."""
        return {
            "query": self.query,
            "document": self.document,
            "instructions": dict(self.instructions),
            "symmetric_task_types": list(self.symmetric_task_types),
            **({} if self.symmetric is None else {"symmetric": self.symmetric}),
        }


def document_text(title: str | None, text: str) -> str:
    """Text of a document record: title and body joined by a blank, as BEIR and the NeMo miner do."""
    return f"{title} {text}".strip() if title else text.strip()


def check_task_type(task_type: str, where: str) -> str:
    """Return the task type, or raise DataError naming ``where`` it stood."""
    if task_type not in TASK_TYPES:
        raise DataError(f"{where}: task_type {task_type!r} is unknown; allowed: {list(TASK_TYPES)}")
    return task_type
