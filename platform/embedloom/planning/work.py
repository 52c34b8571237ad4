"""How much work each artefact is: rows, tokens, steps, FLOPs and bytes, from the config and from what was measured before."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from embedloom.config.rates import ModelShape, RatesConfig, Unit, WorkKind, forward_flops
from embedloom.config.reranker import BASE_NODE, GATE_NODE, MODEL_NODE, SCORES_NODE, RerankerConfig
from embedloom.config.run import Node, Run, RunConfig
from embedloom.config.training import TrainingStage
from embedloom.core.artefacts import Artefact
from embedloom.core.storage import Place
from embedloom.errors import DataError

# ``ledger.json`` and ``plan.json`` of a run: what was predicted, and what happened.


LEDGER_FILE = "ledger.json"
PLAN_FILE = "plan.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One artefact as it was built."""

    name: str
    fingerprint: str
    device: str
    devices: float  # GPUs or cores that worked on it
    unit: str | None  # of ``amount``
    amount: float | None  # work done, as planning counts it
    full_tokens: float | None  # what the tokens would be with every text at its limit
    seconds: float
    start_seconds: float  # part of the seconds that does not grow with the work
    counts: dict[str, Any] = field(default_factory=dict)
    planned_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RunLedger:
    """All artefacts of a run."""

    run: str
    profile: str
    entries: dict[str, LedgerEntry]

    def write(self, place: Place) -> None:
        """Write ``ledger.json`` into the run's folder."""
        content = {"version": VERSION, "run": self.run, "profile": self.profile}
        place.write_json(
            LEDGER_FILE, {**content, "stages": {name: asdict(one) for name, one in self.entries.items()}}
        )


def read_ledger(place: Place) -> RunLedger:
    """The ledger of a run folder.

    Raises:
        DataError: none there, or one that this version does not read.
    """
    if not place.exists(LEDGER_FILE):
        raise DataError(f"{place.uri}: no {LEDGER_FILE}; write it with `embedloom ledger {place.uri}`")
    content = place.read_json(LEDGER_FILE)
    if content.get("version") != VERSION:
        raise DataError(
            f"{place.uri}/{LEDGER_FILE}: version {content.get('version')!r}, this version reads {VERSION}"
        )
    try:
        entries = {name: LedgerEntry(**one) for name, one in content["stages"].items()}
        return RunLedger(content["run"], content["profile"], entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place.uri}/{LEDGER_FILE}: not a ledger ({error}); write it again") from error


# What is known beyond the config: artefacts that are finished, and a run that was measured before.


@dataclass(frozen=True, slots=True)
class Known:
    """Counts and speeds to plan with, in the order of trust: this run's own artefacts, then the measured run's."""

    finished: Mapping[str, Artefact] = field(default_factory=dict)
    measured: RunLedger | None = None
    wanted: Mapping[str, str] = field(default_factory=dict)  # fingerprint that each artefact will have

    def counts(self, node: Node) -> dict[str, Any]:
        """Counts of the artefact, if it is finished or the measured run built the very same."""
        if node.name in self.finished:
            return self.finished[node.name].counts
        entry = self.entry(node)
        return dict(entry.counts) if entry is not None and self.is_same(entry, node) else {}

    def is_same(self, entry: LedgerEntry, node: Node) -> bool:
        """Whether a measured artefact is the one that the node will build, inputs included."""
        return entry.fingerprint == self.wanted.get(node.name)

    def entry(self, node: Node) -> LedgerEntry | None:
        """The measured artefact that is most like this one: same name, else same training stage, else same command."""
        if self.measured is None:
            return None
        entries = self.measured.entries
        if node.name in entries:
            return entries[node.name]
        first, last = node.name.split("/")[0], node.name.rsplit("/", 1)[-1]
        alike = [one for name, one in entries.items() if name.split("/")[0] == first]
        own = [one for one in alike if one.name.rsplit("/", 1)[-1] == last]
        return next(iter([*own, *alike]), None)


def gpus_of(run: Run) -> str | None:
    """Accelerator of the profile's GPU machines; None where it has none, or does not say.

    Machines of several kinds are not told apart: the first in the file's order speaks for all.
    """
    kinds = [pool.accelerator for pool in run.profile.pools.values() if pool.gpus]
    return kinds[0] if kinds else run.profile.accelerator


def device_of(run: Run, gpus: float, rates: RatesConfig) -> str | None:
    """Name in the rates file of what a stage computes on; None where the file has no such GPU, or nobody says which it is."""
    kind = gpus_of(run) if gpus else None
    return None if gpus and kind is None else rates.device_of(kind)


# How many documents and pairs a run will have, before it has read one.


@dataclass(frozen=True, slots=True)
class Size:
    """A number of rows and why it is believed; None: nothing says it."""

    rows: int | None
    basis: str
    is_bound: bool = False  # there may be more


def documents(config: RunConfig, nodes: dict[str, Node], known: Known) -> Size:
    """Documents of the corpus: counted, limited by the config, or at least as many as the synthesis reads."""
    counts = known.counts(nodes["corpus"])
    if isinstance(counts.get("rows"), int):
        return Size(counts["rows"], "counted")
    entry = known.entry(nodes["corpus"])
    if entry is not None and isinstance(entry.counts.get("rows"), int):
        return Size(entry.counts["rows"], "as in the measured run")
    limits = [source.limit for source in config.corpus.sources]
    if all(limit is not None for limit in limits):
        return Size(sum(limit for limit in limits if limit is not None), "the sources' limits")
    read = documents_read(config)
    if not read:
        return Size(None, "unknown until the corpus is read")
    return Size(read, "at least those that the synthesis reads", is_bound=True)


def documents_read(config: RunConfig) -> int:
    """Different documents that the synthesis needs: those of its hungriest family, as families may share."""
    if config.synthesis is None:
        return 0
    most = 0
    for family in config.synthesis.families:
        each = getattr(family, "queries_per_document", None) or getattr(
            family, "questions_per_document", None
        )
        most = max(most, -(-family.rows // each) if each else 0)
    return most


def synthetic_rows(config: RunConfig) -> int:
    """Rows the synthesis is asked for."""
    return sum(family.rows for family in config.synthesis.families) if config.synthesis else 0


def training_pairs(config: RunConfig, nodes: dict[str, Node], known: Known) -> Size:
    """Pairs that are mined for: the corpus's own of the train split, and the synthetic ones."""
    counts = known.counts(nodes["mining"])
    if isinstance(counts.get("rows"), int):
        return Size(counts["rows"], "counted")
    natural, basis = _natural(nodes, known)
    made = synthetic_rows(config)
    if natural is None and not made:
        return Size(None, "unknown until the corpus is read")
    if natural is None:
        return Size(made, "at least the synthetic ones", is_bound=True)
    return Size(natural + made, basis)


def _natural(nodes: dict[str, Node], known: Known) -> tuple[int | None, str]:
    """Pairs of the corpus that will be mined for; a measured run says how many of them were left."""
    mined = known.entry(nodes["mining"])
    if mined is not None and isinstance(mined.counts.get("rows"), int):
        written = known.measured.entries.get("synthesis") if known.measured else None
        made = int(written.counts.get("rows", 0)) if written is not None else 0
        return max(0, mined.counts["rows"] - made), "as in the measured run"
    by_split: Any = known.counts(nodes["corpus"]).get("pairs_by_split", {})
    rows = by_split.get("train") if isinstance(by_split, dict) else None
    return (rows, "counted") if isinstance(rows, int) else (None, "")


# Steps, batches and rows of the training stages, as the config says them.


@dataclass(frozen=True, slots=True)
class Steps:
    """One training stage of one candidate."""

    stage: TrainingStage
    steps: int | None  # None: an epoch of a mix whose size is not known yet
    rows: int | None  # queries, with repeats

    @property
    def texts(self) -> int:
        """Texts a query brings: itself, its positive, its negatives."""
        return 2 + self.stage.negatives


def stage_of(config: RunConfig, name: str) -> TrainingStage:
    """The stage that ``training/<run>/<stage>`` trains, with the run's own changes."""
    _, run_name, wanted = name.rsplit("/", 2)
    section = config.training.of_run(next(run for run in config.training.runs if run.name == run_name))
    return next(stage for stage in section.stages if stage.name == wanted)


def training_steps(config: RunConfig, node: Node, nodes: dict[str, Node], known: Known) -> Steps:
    """Steps of a stage: those the config gives, else the rows of an epoch over the global batch, rounded up.

    The paper's numbers follow: 5,773 steps of 2,048 are one pass over 11.8 million pairs, 4,309,502 rows in batches of
    128 are 33,668 steps (arXiv 2511.07025 Tables 8 and 9).
    """
    stage = stage_of(config, node.name)
    if stage.max_steps is not None:
        return Steps(stage, stage.max_steps, stage.max_steps * stage.global_batch)
    found = known.counts(node)
    if isinstance(found.get("steps"), int):
        return Steps(stage, found["steps"], found["steps"] * stage.global_batch)
    rows = _epoch_rows(stage, nodes, known)
    if rows is None:
        return Steps(stage, None, None)
    steps = max(1, math.ceil(rows * stage.epochs / stage.global_batch))
    return Steps(stage, steps, steps * stage.global_batch)


def _epoch_rows(stage: TrainingStage, nodes: dict[str, Node], known: Known) -> int | None:
    """Rows of one pass: the caps of the sources, or the mined examples where they are known and alone."""
    if stage.sources:
        caps = [source.cap for source in stage.sources]
        return None if any(cap is None for cap in caps) else sum(cap for cap in caps if cap is not None)
    examples: dict[str, Any] = known.counts(nodes["examples"]) if "examples" in nodes else {}
    rows = examples.get("rows")
    return rows if isinstance(rows, int) else None


SEARCH_TYPE: Literal["float32", "bfloat16"] = (
    "bfloat16"  # that exact search nominates in on GPUs (retrieval/search.py)
)
_WEIGHT_BYTES = 4  # exports are float32 unless the base is not


@dataclass(frozen=True, slots=True)
class Work:
    """One artefact's work; None where nothing says it."""

    name: str
    kind: WorkKind | None  # None: an artefact that the rates file has no word for
    base: str | None = None  # the model that computes
    rows: int | None = None
    full_tokens: float | None = None  # with every text at its token limit
    tokens: float | None = None
    flops: float | None = None
    nbytes: float | None = None
    search_flops: float = 0.0  # part of flops, computed in SEARCH_TYPE
    scores: int | None = None
    steps: Steps | None = None
    basis: str = ""
    is_bound: bool = False  # rows are at least so many, and so is what follows from them

    def amount(self, unit: Unit) -> float | None:
        """The work in one unit."""
        values: dict[str, float | None] = {
            "rows": self.rows, "tokens": self.tokens, "bytes": self.nbytes, "flops": self.flops, "scores": self.scores,
        }  # fmt: skip
        return values[unit]


def work_of(run: Run, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known) -> Work:
    """The work of one artefact."""
    first = node.name.split("/")[0]
    builders = {
        "mining": _mining, "rescoring": _rescoring, "training": _training, "merged": _merged, "vectors": _vectors,
    }  # fmt: skip
    if first in builders:
        return builders[first](run, nodes, node, rates, known)
    if node.name in (MODEL_NODE, SCORES_NODE) and run.config.reranker is not None:
        return _reranker(run.config.reranker, nodes, node, rates, known)
    if first == "evaluation":
        models = sum(name != "corpus" for name in node.inputs) + len(run.config.evaluation.baselines)
        tasks = len(run.config.evaluation.tasks)
        return Work(node.name, "evaluate", run.config.encoder.base, scores=models * tasks)
    if first == "corpus":
        size = documents(run.config, nodes, known)
        read = known.counts(node).get("read", size.rows)
        # Cutting takes most of the time; a rates file of an earlier version knows one kind.
        whole = run.config.corpus.chunk_tokens is None and any(
            one.work == "corpus_whole" for one in rates.rates
        )
        return Work(
            node.name,
            "corpus_whole" if whole else "corpus",
            rows=read if isinstance(read, int) else None,
            basis=size.basis,
            is_bound=size.is_bound,
        )
    if first == "examples":
        pairs = training_pairs(run.config, nodes, known)
        return Work(node.name, "examples", rows=pairs.rows, basis=pairs.basis, is_bound=pairs.is_bound)
    kinds: dict[str, WorkKind] = {
        "encoder": "encoder", "gate": "gate", "synthesis": "synthesize", BASE_NODE: "encoder", GATE_NODE: "gate",
    }  # fmt: skip
    return Work(node.name, kinds.get(node.name, kinds.get(first)))


def _reranker(
    config: RerankerConfig, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known
) -> Work:
    """Every document of a query is read with it: forward and backward in training, forward alone in the evaluation."""
    if node.name == SCORES_NODE:
        return Work(
            node.name,
            "embed",
            config.base,
            basis="as many pairs as its tasks have, unknown until they are read",
        )
    stage = config.stage
    epoch = _epoch_rows(stage, nodes, known)
    rows = None if epoch is None else math.ceil(epoch * stage.epochs)
    rows = stage.max_steps * stage.global_batch if stage.max_steps is not None else rows
    if rows is None:
        return Work(node.name, "train", config.base, basis="an epoch of a mix whose size is not known yet")
    fill, shape, pairs = (
        _fill(node, rates, known),
        rates.models.get(config.base),
        rows * (1 + stage.negatives),
    )
    full = float(pairs * config.max_tokens)
    flops = None if shape is None else 3 * embedding_flops(shape, None, pairs, config.max_tokens * fill)
    return Work(node.name, "train", config.base, rows, full, full * fill, flops)


def _mining(run: Run, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known) -> Work:
    """Both sides through every teacher, then every query against every document."""
    config = run.config.mining
    pairs, texts = training_pairs(run.config, nodes, known), documents(run.config, nodes, known)
    base = config.teachers[0].model
    if pairs.rows is None or texts.rows is None:
        return Work(
            node.name, "embed", base, pairs.rows, basis=pairs.basis if pairs.rows is None else texts.basis
        )
    tokens = float(pairs.rows * config.max_query_tokens + texts.rows * config.max_document_tokens)
    fill = _fill(node, rates, known)
    shapes = [rates.models.get(teacher.model) for teacher in config.teachers]
    flops, searching = None, 0.0
    if all(shape is not None for shape in shapes):
        sides = (
            (pairs.rows, config.max_query_tokens * fill),
            (texts.rows, config.max_document_tokens * fill),
        )
        known_shapes = [shape for shape in shapes if shape is not None]
        searching = sum(2.0 * pairs.rows * texts.rows * shape.hidden_size for shape in known_shapes)
        flops = searching + sum(
            embedding_flops(shape, None, rows, each) for shape in known_shapes for rows, each in sides
        )
    full = tokens * len(config.teachers)
    basis = f"documents {texts.basis}, pairs {pairs.basis}"
    bound = pairs.is_bound or texts.is_bound
    return Work(
        node.name,
        "embed",
        base,
        pairs.rows,
        full,
        full * fill,
        flops,
        search_flops=searching,
        basis=basis,
        is_bound=bound,
    )


def _rescoring(run: Run, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known) -> Work:
    config = run.config.mining.rescoring
    pairs = training_pairs(run.config, nodes, known)
    if config is None or pairs.rows is None:
        return Work(node.name, "embed", basis=pairs.basis)
    read = replace(pairs, rows=pairs.rows * config.top)
    return _through(node, config.model, None, read, config.max_tokens, rates, known)


def _vectors(run: Run, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known) -> Work:
    config, base = run.config.encoder, run.config.encoder.base
    if run.config.embedding.corpus is not None:
        return Work(node.name, "embed", base, basis="a corpus of its own, unknown until it is read")
    size = documents(run.config, nodes, known)
    if size.rows is None:
        return Work(node.name, "embed", base, basis=size.basis)
    return _through(node, base, config.depth, size, config.max_document_tokens, rates, known)


def _through(
    node: Node, base: str, layers: int | None, size: Size, limit: int, rates: RatesConfig, known: Known
) -> Work:
    """So many texts once through a model."""
    fill, rows = _fill(node, rates, known), size.rows or 0
    shape = rates.models.get(base)
    flops = None if shape is None else embedding_flops(shape, layers, rows, limit * fill)
    full, basis = float(rows * limit), size.basis
    return Work(node.name, "embed", base, rows, full, full * fill, flops, basis=basis, is_bound=size.is_bound)


def _training(run: Run, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known) -> Work:
    """Forward and backward, three forwards' worth; recomputation is not counted, as in MFU."""
    config = run.config.encoder
    steps = training_steps(run.config, node, nodes, known)
    work = Work(node.name, "train", config.base, steps.rows, steps=steps)
    if steps.rows is None:
        return replace(work, basis="an epoch of a mix whose size is not known yet")
    fill = _fill(node, rates, known)
    shape = rates.models.get(config.base)
    document_tokens = steps.stage.max_document_tokens or config.max_document_tokens
    sides = ((steps.rows, config.max_query_tokens), (steps.rows * (steps.texts - 1), document_tokens))
    full = float(sum(rows * limit for rows, limit in sides))
    flops = None
    if shape is not None:
        flops = 3 * sum(embedding_flops(shape, config.depth, rows, limit * fill) for rows, limit in sides)
    return replace(work, full_tokens=full, tokens=full * fill, flops=flops)


def _merged(run: Run, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known) -> Work:
    """Every candidate is read once, the merged model written once."""
    shape = rates.models.get(run.config.encoder.base)
    models = sum(name.startswith("training/") for name in node.inputs)
    searched = " and a search over weights, which is not priced" if run.config.merging.search else ""
    if shape is None:
        return Work(node.name, "merge", basis="size of the base is not in the rates file")
    layers = run.config.encoder.depth or shape.layers
    parameters = layers * shape.layer_weights + shape.embedding_weights
    return Work(node.name, "merge", nbytes=float((models + 1) * parameters * _WEIGHT_BYTES), basis=searched)


def _fill(node: Node, rates: RatesConfig, known: Known) -> float:
    """Share of the token limits that texts fill: measured where it was, else the file's assumption."""
    entry = known.entry(node)
    tokens = entry.counts.get("tokens") if entry is not None else None
    if entry is not None and entry.full_tokens and isinstance(tokens, int | float):
        return min(1.0, float(tokens) / entry.full_tokens)
    return rates.text_fill.value


def embedding_flops(shape: ModelShape, layers: int | None, texts: float, tokens_each: float) -> float:
    """``forward_flops`` of texts of one length."""
    depth = min(layers or shape.layers, shape.layers)
    return texts * forward_flops(
        depth * shape.layer_weights, depth, shape.hidden_size, tokens_each, tokens_each**2
    )
