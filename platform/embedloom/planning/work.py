"""How much work each artefact is: rows, tokens, FLOPs, bytes, from the config and what is known beyond it."""

from dataclasses import dataclass, replace

from embedloom.config.rates import ModelShape, RatesConfig, Unit, WorkKind, forward_flops
from embedloom.planning.known import Known
from embedloom.planning.sizes import Size, documents, training_pairs
from embedloom.planning.training_steps import Steps, training_steps
from embedloom.run import Node, Run

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
    if first == "evaluation":
        models = sum(name != "corpus" for name in node.inputs) + len(run.config.evaluation.baselines)
        tasks = len(run.config.evaluation.tasks)
        return Work(node.name, "evaluate", run.config.encoder.base, scores=models * tasks)
    if first == "corpus":
        size = documents(run.config, nodes, known)
        read = known.counts(node).get("read", size.rows)
        return Work(
            node.name,
            "corpus",
            rows=read if isinstance(read, int) else None,
            basis=size.basis,
            is_bound=size.is_bound,
        )
    if first == "examples":
        pairs = training_pairs(run.config, nodes, known)
        return Work(node.name, "examples", rows=pairs.rows, basis=pairs.basis, is_bound=pairs.is_bound)
    kinds: dict[str, WorkKind] = {"encoder": "encoder", "gate": "gate", "synthesis": "synthesize"}
    return Work(node.name, kinds.get(first))


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
    flops = None
    if all(shape is not None for shape in shapes):
        sides = (
            (pairs.rows, config.max_query_tokens * fill),
            (texts.rows, config.max_document_tokens * fill),
        )
        flops = sum(
            2.0 * pairs.rows * texts.rows * shape.hidden_size
            + sum(embedding_flops(shape, None, rows, each) for rows, each in sides)
            for shape in shapes
            if shape is not None
        )
    full = tokens * len(config.teachers)
    basis = f"documents {texts.basis}, pairs {pairs.basis}"
    bound = pairs.is_bound or texts.is_bound
    return Work(node.name, "embed", base, pairs.rows, full, full * fill, flops, basis=basis, is_bound=bound)


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
    return _through(node, base, config.num_layers, size, config.max_document_tokens, rates, known)


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
    sides = (
        (steps.rows, config.max_query_tokens), (steps.rows * (steps.texts - 1), config.max_document_tokens),
    )  # fmt: skip
    full = float(sum(rows * limit for rows, limit in sides))
    flops = None
    if shape is not None:
        flops = 3 * sum(
            embedding_flops(shape, config.num_layers, rows, limit * fill) for rows, limit in sides
        )
    return replace(work, full_tokens=full, tokens=full * fill, flops=flops)


def _merged(run: Run, nodes: dict[str, Node], node: Node, rates: RatesConfig, known: Known) -> Work:
    """Every candidate is read once, the merged model written once."""
    shape = rates.models.get(run.config.encoder.base)
    models = sum(name.startswith("training/") for name in node.inputs)
    searched = " and a search over weights, which is not priced" if run.config.merging.search else ""
    if shape is None:
        return Work(node.name, "merge", basis="size of the base is not in the rates file")
    layers = run.config.encoder.num_layers or shape.layers
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
