"""What evaluation actors are asked to do, small and picklable, and what they answer."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from embedloom.evaluation.shard_plan import Shard
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.vector_store import Keys
from embedloom.instructions import PromptContract

Group = Literal["models", "baselines"]
RESULTS_FOLDER = "results"
UNITS_FOLDER = "units"
ITEMS_FOLDER = "items"
WHOLE = "all"  # names the file of a task that is scored in one go


@dataclass(frozen=True, slots=True)
class Scorer:
    """What gets scored: a model folder, or BM25 where ``folder`` is None."""

    name: str  # in scores.json
    group: Group
    mteb_name: str  # organisation/model
    revision: str
    folder: Path | None = None
    contract_hash: str = ""

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
