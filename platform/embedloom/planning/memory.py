"""Whether the stages of a run fit the GPUs that a profile gives them, and what would fit."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from embedloom.config.cluster import PoolConfig, Profile, TrainingGroup
from embedloom.config.embedding import ComputeType, computed_dtype
from embedloom.config.rates import ModelShape, RatesConfig
from embedloom.config.run import Node, Run
from embedloom.config.training import TrainingConfig, TrainingStage
from embedloom.core.memory import (
    USABLE_SHARE,
    Memory,
    Remedy,
    Shape,
    Trainer,
    engine_memory,
    inference_memory,
    search_memory,
    training_memory,
    training_remedy,
)
from embedloom.errors import ConfigError
from embedloom.planning.work import Known, Size, device_of, documents
from embedloom.synthesis.prompts_used import writers

GB = 1e9
SERVING = "serving"
_BATCH_TOKENS = 65_536  # of an embedding actor on a GPU, at most
_SEARCH_QUERIES, _SEARCH_ROWS = 2048, 2**17  # queries and documents whose scores are held at once
_MOST_COPIES = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """One process group's memory against what there is.

    Attributes:
        stage: part of the run.
        what: model, and how it is held.
        memory: of one GPU; None: the model's size is not known.
        limit: bytes that may be filled.
        remedy: what would fit instead, as a sentence; empty where it fits.
    """

    stage: str
    what: str
    memory: Memory | None
    limit: float
    remedy: str = ""

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return self.memory is None or self.memory.total <= self.limit

    @property
    def refusal(self) -> str:
        """Why it cannot run."""
        assert self.memory is not None  # noqa: S101 - only what is known can be too much
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in self.memory.parts.items())
        return (
            f"{self.stage}: {self.what} takes {self.memory.total / GB:.0f} GB of a GPU ({parts}), and "
            f"{self.limit / GB:.1f} GB may be filled; {self.remedy}"
        )


def shape_of(shape: ModelShape, layers: int | None = None) -> Shape:
    """A model of the rates file, cut to its first ``layers``."""
    depth = min(layers or shape.layers, shape.layers)
    return Shape.of_layers(
        depth, shape.hidden_size, shape.layer_weights, shape.embedding_weights, shape.key_size, shape.mlp_size
    )


def gpu_bytes(run: Run, rates: RatesConfig) -> float | None:
    """Memory of one of the profile's GPUs; None: it has none, or their kind is not in the rates file."""
    device = device_of(run, run.profile.total_gpus, rates) if run.profile.total_gpus else None
    found = None if device is None else rates.devices[device].memory_gb
    return None if found is None else found.value * GB


def trainer_of(
    config: TrainingConfig, stage: TrainingStage, group: TrainingGroup, dtype: str, shape: Shape
) -> Trainer:
    """How a stage trains on a group of GPUs, as far as memory depends on it; reductions as of several micro-batches."""
    half = dtype != "float32" and group.bf16_weights is not False
    trained = None
    if config.lora is not None:
        trained = _adapter_weights(shape, config.lora.rank)
    elif config.freeze_token_embeddings:
        trained = shape.weights - shape.embedding_weights
    every = config.recomputed_layers(stage)
    return Trainer(
        workers=group.workers,
        zero_stage=config.zero_stage,
        weight_dtype="bfloat16" if half else "float32",
        gradient_dtype=group.gradient_dtype,
        recomputed_layers=math.ceil(shape.layers / every) if every else 0,
        overlaps=config.zero_stage > 0,
        reduces_once=group.reduces_each_step(config.zero_stage),
        trained_weights=trained,
    )


def _adapter_weights(shape: Shape, rank: int) -> int:
    """Of low-rank adapters on every linear layer: rank x (inputs + outputs)."""
    h, k, mlp = shape.hidden_size, shape.key_size, shape.mlp_size
    return shape.layers * rank * (4 * h + 2 * (h + k) + 3 * (h + mlp))


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Tokens of a training step at the limits of the texts.

    Attributes:
        group: of one query with its documents, which is never cut in two.
        rank: of one worker.
        micro_batch: of one forward.
    """

    group: int
    rank: int
    micro_batch: int

    @property
    def passes(self) -> int:
        """Micro-batches of a step."""
        return -(-self.rank // self.micro_batch)


def step_tokens(run: Run, stage: TrainingStage, shape: Shape, device: float) -> StepTokens:
    """Tokens of a stage's step, every text at its limit.

    Args:
        run: the run.
        stage: of its training.
        shape: of the model, which decides what ``micro_batch_tokens: auto`` is.
        device: memory of a GPU in bytes.
    """
    config, encoder, group = run.config.training, run.config.encoder, run.profile.stages.training
    document_tokens = stage.max_document_tokens or encoder.max_document_tokens
    of_group = encoder.max_query_tokens + (1 + stage.negatives) * document_tokens
    queries = -(-stage.global_batch // group.workers)
    rank = queries * of_group
    if config.micro_batch_tokens == "auto":
        trainer = trainer_of(config, stage, group, encoder.dtype, shape)
        whole = training_memory(shape, replace(trainer, reduces_once=False), rank)
        most = rank if whole.fits(device) else training_memory(shape, trainer, 0).largest_batch(device)
    else:
        most = config.micro_batch_tokens
    # Groups are never cut, so a micro-batch holds whole ones, and one that is longer than the limit alone.
    return StepTokens(of_group, rank, min(rank, max(1, most // of_group) * of_group))


def step_trainer(trainer: Trainer, tokens: StepTokens) -> Trainer:
    """The same for a step of so many micro-batches: a single one is reduced as it goes, and holds no whole gradient."""
    once = trainer.reduces_once and tokens.passes > 1 and trainer.workers > 1
    return replace(trainer, reduces_once=once)


def fits(
    run: Run, nodes: dict[str, Node], rates: RatesConfig, known: Known, building: Collection[str]
) -> list[Fit]:
    """Memory of every stage that computes on GPUs; empty where the profile has none of a known size.

    Args:
        run: the run.
        nodes: its graph.
        rates: sizes of models and devices.
        known: counts of what is finished.
        building: the artefacts that are to be built; what is served is looked at in any case.
    """
    device = gpu_bytes(run, rates)
    if device is None:
        return []
    verbs = {nodes[name].verb for name in building}
    found: list[Fit] = []
    if "synthesize" in verbs:
        found += _engines(run, rates, device)
    if "mine" in verbs:
        found += _mining(run, documents(run.config, nodes, known), rates, device)
    if "train" in verbs:
        found += _training(run, rates, device)
    return [*found, *_encoding(run, verbs, rates, device), *_serving(run, rates, device)]


def _training(run: Run, rates: RatesConfig, device: float) -> Iterator[Fit]:
    """Once a stage: candidates differ in seeds and mixes, not in size."""
    group, base = run.profile.stages.training, run.config.encoder.base
    if not group.gpus:
        return
    limit = USABLE_SHARE * device
    found = rates.models.get(base)
    for stage in run.config.training.stages:
        name = f"training ({stage.name})"
        if found is None:
            yield Fit(name, _unknown(base), None, limit)
            continue
        shape, config = shape_of(found, run.config.encoder.depth), run.config.training
        trainer = trainer_of(config, stage, group, run.config.encoder.dtype, shape)
        if trainer.weight_dtype == "bfloat16" and trainer.zero_stage == 0:
            continue  # refused by what builds the engine, with the reason
        tokens = step_tokens(run, stage, shape, device)
        memory = training_memory(shape, step_trainer(trainer, tokens), tokens.micro_batch)
        remedy = ""
        if memory.total > limit:
            found_one = training_remedy(shape, trainer, tokens.micro_batch, tokens.group, device)
            remedy = _remedy(found_one, trainer, run.profile, config.micro_batch_tokens == "auto")
        how = f"{base}, {_trainer_text(trainer, shape)}, {tokens.micro_batch:,} tokens"
        yield Fit(name, how, memory, limit, remedy)


def _trainer_text(trainer: Trainer, shape: Shape) -> str:
    again = f"{trainer.recomputed_layers} of {shape.layers} layers computed again"
    plural = "" if trainer.workers == 1 else "s"
    return f"ZeRO-{trainer.zero_stage} on {trainer.workers} GPU{plural}, {again}"


def _remedy(found: Remedy | None, trainer: Trainer, profile: Profile, auto: bool) -> str:
    if found is None:
        return "nothing on up to 1,024 GPUs of this kind does: allowed are a smaller model, shorter texts or training.lora"
    proposed = found.trainer
    keys = []
    if proposed.zero_stage != trainer.zero_stage:
        keys.append(f"training.zero_stage: {proposed.zero_stage}")
    if proposed.recomputed_layers != trainer.recomputed_layers:
        keys.append("training.gradient_checkpointing: true")
    if not auto:
        keys.append(f"training.micro_batch_tokens: {found.tokens}")
    if proposed.workers != trainer.workers:
        there = (
            f", of which this profile has {profile.total_gpus}"
            if proposed.workers > profile.total_gpus
            else ""
        )
        keys.append(f"{proposed.workers} GPUs (stages.training.workers{there})")
    return f"what fits, at {found.memory.total / GB:.0f} GB: {', '.join(keys)}"


def _encoding(run: Run, verbs: set[str], rates: RatesConfig, device: float) -> Iterator[Fit]:
    """Embedding and evaluation: the run's own encoder in every actor."""
    stages, config = run.profile.stages, run.config
    wanted: tuple[tuple[str, str, PoolConfig, ComputeType], ...] = (
        ("evaluation", "evaluate", stages.evaluation, config.encoder.dtype),
        ("embedding", "embed", stages.embedding, config.embedding.compute_dtype),
    )
    for name, verb, pool, dtype in wanted:
        if pool.gpus and verb in verbs:
            yield _encoder(
                name,
                config.encoder.base,
                config.encoder.depth,
                pool.gpus,
                dtype,
                rates,
                device,
                _BATCH_TOKENS,
            )


def _serving(run: Run, rates: RatesConfig, device: float) -> Iterator[Fit]:
    serving, scaling, encoder = run.config.serving, run.profile.serve, run.config.encoder
    if not scaling.gpus:
        return
    yield _encoder(
        SERVING,
        encoder.base,
        encoder.depth,
        scaling.gpus,
        serving.compute_dtype,
        rates,
        device,
        serving.max_batch_tokens,
    )


def _encoder(
    stage: str,
    model: str,
    layers: int | None,
    gpus: float,
    dtype: ComputeType,
    rates: RatesConfig,
    device: float,
    tokens: int,
) -> Fit:
    found = rates.models.get(model)
    if found is None:
        return Fit(stage, _unknown(model), None, USABLE_SHARE * device)
    copies = max(1, min(_MOST_COPIES, int(1 / gpus + 1e-6)))
    computed = computed_dtype(dtype, gpus)
    memory = inference_memory(shape_of(found, layers), computed, tokens, copies)
    together = f" x {copies} on a GPU" if copies > 1 else ""
    remedy = (
        "allowed: a share of a GPU of its own (gpus: 1)"
        if copies > 1
        else "allowed: compute_dtype bfloat16, or a smaller model"
    )
    return Fit(
        stage, f"{model} in {computed}{together}, {tokens:,} tokens", memory, USABLE_SHARE * device, remedy
    )


def _mining(run: Run, size: Size, rates: RatesConfig, device: float) -> Iterator[Fit]:
    """Every teacher in turn, the cross-encoder, and a share of the documents' vectors in each actor."""
    pool, config = run.profile.stages.mining, run.config.mining
    if not pool.gpus:
        return
    for teacher in config.teachers:
        if teacher.engine == "openai":
            continue
        yield _encoder("mining", teacher.model, None, pool.gpus, teacher.dtype, rates, device, _BATCH_TOKENS)
        found = rates.models.get(teacher.model)
        if found is not None and size.rows is not None:
            held = config.memory_gib * 2**30 / (4 * found.hidden_size)
            rows = min(size.rows / pool.max_actors, held)
            memory = search_memory(rows, found.hidden_size, "float32", _SEARCH_QUERIES, _SEARCH_ROWS)
            what = f"{size.rows / pool.max_actors:,.0f} vectors of {found.hidden_size}"
            yield Fit(
                "mining (search)",
                what,
                memory,
                USABLE_SHARE * device,
                "allowed: less mining.memory_gib, or more actors",
            )
    if config.rescoring is not None:
        yield _encoder(
            "rescoring",
            config.rescoring.model,
            None,
            pool.gpus,
            config.rescoring.dtype,
            rates,
            device,
            _BATCH_TOKENS,
        )


def _engines(run: Run, rates: RatesConfig, device: float) -> Iterator[Fit]:
    """vLLM engines, each alone on its GPUs."""
    config, profile_pool = run.config.synthesis, run.profile.stages.synthesis
    if config is None:
        return
    for generator in writers(config):
        pool = generator.pool or profile_pool
        if not pool.gpus or generator.endpoint is not None:
            continue
        share = generator.engine.gpu_memory_share * min(1.0, pool.gpus)
        weights = weight_bytes(rates, generator.model)
        if weights is None:
            yield Fit("synthesis", _unknown(generator.model), None, share * device)
            continue
        memory = engine_memory(weights, pool.tensor_parallel, device)
        spans = f" over {pool.tensor_parallel} GPUs" if pool.tensor_parallel > 1 else ""
        yield Fit(
            "synthesis",
            f"{generator.model}{spans}",
            memory,
            share * device,
            _parallel(weights, device, share),
        )


def weight_bytes(rates: RatesConfig, model: str) -> float | None:
    """Size of a model's weights in bfloat16, or as the rates file states it; None: unknown."""
    stated = rates.weights_of(model)
    if stated is not None:
        return stated * GB
    shape = rates.models.get(model)
    return None if shape is None else 2.0 * shape_of(shape).weights


def _parallel(weights: float, device: float, share: float) -> str:
    fitting = [n for n in (1, 2, 4, 8) if engine_memory(weights, n, device).total <= share * device]
    if not fitting:
        return "no node of eight such GPUs holds it: allowed is a smaller generator"
    return f"allowed: tensor_parallel and gpus of {fitting[0]} or more in the generator's pool"


def _unknown(model: str) -> str:
    return f"{model}: its size is not in the rates file, so its memory is not checked"


def memory_problems(
    run: Run, nodes: dict[str, Node], known: Known, building: Collection[str]
) -> list[ConfigError]:
    """What cannot fit of the artefacts to be built: a stage its GPUs. The corpus's tasks hold blocks of a fixed size.

    What is served is left out: whoever serves looks at the model that there is by then.
    """
    held = [] if run.rates is None else fits(run, nodes, run.rates, known, building)
    return [ConfigError(one.refusal) for one in held if not one.fits and one.stage != SERVING]
