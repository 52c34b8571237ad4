"""What evaluation actors are asked to do and what they answer: jobs, the shards of texts they embed, the vectors they keep."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from embedloom.core.prompting import PromptContract, Side
from embedloom.core.storage import Place
from embedloom.encoder.model import Vectors
from embedloom.encoder.registry import NodeModel
from embedloom.encoder.tokenizer import CutTexts
from embedloom.errors import DataError
from embedloom.evaluation.specs import TaskSpec
from embedloom.retrieval.ledger import first_of_equals

# Vectors of texts on disk, one file a shard: what one model embedded once serves every task that has the text.
#
# A folder belongs to one model, one prompt contract and one compute type; a file is written whole or not at all, and
# its name is the hash of the texts in it, so a killed evaluation finds what it finished and trusts nothing else.


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

    def summary(self, shard: str) -> tuple[tuple[int, int], CutTexts]:
        """(tokens, padded tokens) of a shard, and what the limits left out of its texts, of which a shard of an earlier version
        says nothing; its vectors are not read."""
        with self.place.open_parts(_file(shard)) as stream, self._opened(stream, shard) as content:
            tokens, padded = content["tokens"]
            cuts = CutTexts(*map(int, content["cut"])) if "cut" in content else CutTexts()
            return (int(tokens), int(padded)), cuts

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
        return self._opened(io.BytesIO(self.place.read_bytes(_file(shard))), shard)

    def _opened(self, stream: IO[bytes], shard: str) -> Any:
        try:
            return np.load(stream, allow_pickle=False)
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


# Who embeds which text: every distinct text of a model belongs to the first part of a task that has it.
#
# The plan follows from the tasks alone, not from what is finished, so batches, and with them the last bits of the
# vectors, are the same in a run that was killed ten times and in one that was not.


Rows = np.ndarray[Any, np.dtype[np.int64]]
Part = tuple[TaskSpec, str | None]  # a task and one of its subsets, or None for all


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """Some texts of one part of a task."""

    id: str
    part: Part
    rows: Rows  # positions in the part's list of distinct texts


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All shards, and the ones that each part needs before it can be scored."""

    shards: list[Shard] = field(default_factory=list)
    needs: dict[Part, tuple[str, ...]] = field(default_factory=dict)


def plan_shards(keys: Mapping[Part, Keys], shard_texts: int) -> ShardPlan:
    """Cut the texts of all parts into shards of at most ``shard_texts``, no text in two of them.

    Args:
        keys: of each part's distinct texts, uint64 [texts, 2]; parts in the order in which they own texts.
        shard_texts: largest shard.
    """
    plan = ShardPlan()
    parts = list(keys)
    if not parts:
        return plan
    sizes = [len(keys[part]) for part in parts]
    owner = first_of_equals(np.concatenate([keys[part] for part in parts]))
    shard_of = np.full(len(owner), -1, dtype=np.int64)
    starts = np.cumsum([0, *sizes[:-1]])
    for part, start, size in zip(parts, starts, sizes, strict=True):
        own = np.flatnonzero(owner[start : start + size] == np.arange(start, start + size))
        for low in range(0, len(own), shard_texts):
            rows = own[low : low + shard_texts]
            shard_of[start + rows] = len(plan.shards)
            plan.shards.append(Shard(shard_id(keys[part][rows]), part, rows))
    for part, start, size in zip(parts, starts, sizes, strict=True):
        numbers: Sequence[int] = np.unique(shard_of[owner[start : start + size]]).tolist()
        plan.needs[part] = tuple(plan.shards[number].id for number in numbers)
    return plan


Group = Literal["models", "baselines"]
RESULTS_FOLDER = "results"
UNITS_FOLDER = "units"
ITEMS_FOLDER = "items"
WHOLE = "all"  # names the file of a task that is scored in one go


@dataclass(frozen=True, slots=True)
class Scorer:
    """What gets scored: a model folder, alone or fused with BM25, or BM25 where ``folder`` is None."""

    name: str  # in scores.json
    group: Group
    mteb_name: str  # organisation/model
    revision: str
    folder: Path | NodeModel | None = None
    contract_hash: str = ""
    reranker: Path | NodeModel | None = None  # folder of what orders its first documents anew
    top: int = 0  # how many
    fused: bool = False  # with BM25, as hybrid searches are

    @property
    def only_ranks(self) -> bool:
        """Whether there is nothing for it in tasks that rank no documents."""
        return self.folder is None or self.fused

    @property
    def result_folder(self) -> str:
        """Where mteb keeps its results, relative to the artefact."""
        return f"{RESULTS_FOLDER}/{self.mteb_name.replace('/', '__').replace(' ', '_')}/{self.revision}"

    def under(self, name: str) -> "Scorer":
        """The same model, its files under another name."""
        return replace(self, name=name)


@dataclass(frozen=True, slots=True)
class Unit:
    """One result to compute: a scorer on a task, or on one subset of it."""

    scorer: Scorer
    task: TaskSpec
    subset: str | None = None

    @property
    def label(self) -> str:
        """``model/task[/subset]``, as errors and progress name it."""
        parts = [
            self.scorer.name,
            self.task.name,
            *([self.subset] if self.subset not in (None, "default") else []),
        ]
        return "/".join(str(part) for part in parts)

    @property
    def result_path(self) -> str:
        """mteb's result file of the whole task, relative to the artefact."""
        return f"{self.scorer.result_folder}/{self.task.name}.json"

    @property
    def figures_path(self) -> str:
        """Our own figures of the whole task; written once every subset is done."""
        return f"{UNITS_FOLDER}/{self.scorer.group}/{self.scorer.name}/{self.task.name}.json"

    @property
    def part_path(self) -> str:
        """Our own figures of this unit."""
        return f"{UNITS_FOLDER}/{self.scorer.group}/{self.scorer.name}/{self.task.name}/{self.subset or WHOLE}.json"

    @property
    def items_folder(self) -> str:
        """Items of the whole task, one Parquet file a unit."""
        return f"{ITEMS_FOLDER}/{self.scorer.group}/{self.scorer.name}/{self.task.name}"

    @property
    def items_path(self) -> str:
        """Items of this unit."""
        return f"{self.items_folder}/{self.subset or WHOLE}.parquet"


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """One call of an actor; jobs are compared by identity."""

    label: str
    scorer: Scorer | None = None  # the model it needs warm
    needs: tuple["Job", ...] = ()  # jobs that must be done first


@dataclass(frozen=True, eq=False, slots=True)
class SurveyJob(Job):
    """Find a task's subsets and the texts each model contract has to embed for them."""

    task: TaskSpec | None = None
    contracts: tuple[PromptContract, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class EmbedJob(Job):
    """Embed one shard into the vector store."""

    shard: Shard | None = None
    store: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class ScoreJob(Job):
    """Let mteb score one unit with the vectors of some shards."""

    unit: Unit | None = None
    shards: tuple[str, ...] = ()
    store: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class TimeJob(Job):
    """Time single queries on a model."""

    queries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SentPrompts:
    """What stands before a task's queries as they are scored, and what the endpoint puts there by default."""

    sent: list[str]  # different ones, "{text}" in place of the text
    default: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What a task turned out to be."""

    type: str
    metric: str
    revision: str
    splits: tuple[str, ...]
    subsets: tuple[str, ...]  # mteb's order
    parts: tuple[str | None, ...]  # what is scored apart
    ranks_documents: bool
    keys: dict[str, dict[str | None, Keys]]  # contract hash -> part -> keys of its distinct texts
    prompts: dict[str, SentPrompts] = field(default_factory=dict)  # by contract hash


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job gave: mteb's files by name, items as Parquet rows, our own figures."""

    files: dict[str, bytes] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    items: Any = None  # pyarrow.Table
    survey: Survey | None = None
