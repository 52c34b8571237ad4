"""The training loop of one worker, and its config. Ray Train starts one in every process of the group."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from embedloom.config.cluster import TrainingGroup
from embedloom.config.reranker import RerankerConfig
from embedloom.config.training import (
    ROUNDING,
    WATCHING,
    SourceDistillation,
    TrainingConfig,
    TrainingSource,
    TrainingStage,
)
from embedloom.core.artefacts import fingerprint
from embedloom.core.progress import note
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.model import Encoder
from embedloom.encoder.pairs import PairEncoder
from embedloom.encoder.registry import NodeModel, local_folder
from embedloom.training.checkpoints import (
    MODEL_CHECKPOINT,
    is_model,
    load_checkpoint,
    save_checkpoint,
    temporary_folder,
)
from embedloom.training.data import ExampleStore
from embedloom.training.dev import DevScores, DevTasks
from embedloom.training.gradients import GradientPass, StepReduction
from embedloom.training.learner import EmbeddingLearner, Learner, RerankerLearner
from embedloom.training.metrics import (
    METRICS_FILE,
    LossWatch,
    StepRecord,
    StepWriter,
    metrics_text,
    peak_flops,
    peak_memory_mib,
    training_flops,
)
from embedloom.training.model import (
    CPU_TOKENS,
    build_engine,
    deepspeed_settings,
    fitting_tokens,
    matrix_weights,
    shape_of,
    trainer_of,
    unsharded_gradient_norm,
)
from embedloom.training.order import BatchPlan, BatchReader, StepBatch, learning_rate, order_of, steps_of


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Everything a worker needs; picklable."""

    label: str
    training: TrainingConfig
    stage: TrainingStage
    sources: tuple[TrainingSource, ...]
    seed: int
    learning_rate_scale: float
    dtype: DTypeName
    start_model: Path | NodeModel
    data: Place  # prepared sources
    folders: dict[str, str]  # of each source, below data
    logs: Place
    threads: int
    dev_tasks: DevTasks | None = None  # of training.dev
    contract: PromptContract | None = None  # of the model that comes out; None: as of the one it starts from
    group: TrainingGroup = field(default_factory=TrainingGroup)
    reranker: RerankerConfig | None = None  # what is trained is one; None: an embedding model

    @property
    def rounding(self) -> dict[str, Any]:
        """The settings that decide rounding only; a run may go on with others."""
        return self.training.model_dump(mode="json", include=set(ROUNDING))

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must have been made with to go on from it."""
        return self.fingerprint_with(self.rounding)

    def fingerprint_with(self, rounding: Mapping[str, Any]) -> str:
        """The same, of a run that had these settings."""
        varying = {"runs", "stages", "checkpoint_every_steps", *WATCHING}
        training = self.training.model_dump(mode="json", exclude=varying) | dict(rounding)
        stage = self.stage.model_dump(mode="json", exclude=set(ROUNDING))
        own = () if self.reranker is None else (self.reranker.model_dump(mode="json", include={"loss"}),)
        return fingerprint(training, stage, self.sources, self.seed, self.learning_rate_scale, *own)

    @property
    def identity(self) -> str:
        """By which trackers know the run: another one for each place that it is trained in."""
        return fingerprint(self.fingerprint_with(dict.fromkeys(ROUNDING)), self.logs.uri)

    @property
    def settings(self) -> dict[str, str]:
        """What trackers show of the run."""
        training = self.training.model_dump(mode="json", exclude={"runs", "stages"}, exclude_none=True)
        stage = self.stage.model_dump(mode="json", exclude={"sources"}, exclude_none=True)
        scale = {"seed": self.seed, "learning_rate_scale": self.learning_rate_scale}
        return {key: str(value) for key, value in {**training, **stage, **scale}.items()}


def train_worker(config: LoopConfig) -> str | None:
    """Train one stage of one candidate and report checkpoints; the last one holds the model folder.

    Returns:
        Why the run stopped itself, or None. Not raised: the same step would fail again after every restart.
    """
    import ray.train

    torch.set_num_threads(config.threads)
    context = ray.train.get_context()
    trainer = StageTrainer(config, context.get_world_rank(), context.get_world_size())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            if is_model(Path(folder)):
                return None
            trainer.resume(Path(folder))
    return trainer.run()


def open_learner(config: LoopConfig) -> Learner:
    """The start model, loaded to be trained as the config says.

    An embedding model has from the first step on the contract that is exported: dev scores and golden vectors are by what
    is served.
    """
    training, stage = config.training, config.stage
    if config.reranker is not None:
        pairs = PairEncoder.open(local_folder(config.start_model), dtype=config.dtype, trainable=True)
        return RerankerLearner(pairs, config.reranker, training, stage)
    folder = local_folder(config.start_model)
    encoder = Encoder.load(folder, dtype=config.dtype, trainable=True, contract=config.contract)
    return EmbeddingLearner(encoder, training, stage)


class StageTrainer:
    """Engine, data order and step counter of one worker."""

    def __init__(self, config: LoopConfig, rank: int, world_size: int) -> None:
        self.config = config
        self.rank = rank
        self.world_size = world_size
        training, stage = config.training, config.stage
        torch.manual_seed(config.seed)
        self.learner = open_learner(config)
        self.encoder = self.learner.encoder
        self.store = ExampleStore(config.data, config.folders, stage.negatives, self._teaching())
        self.order = order_of(training, stage, config.sources, self.store, config.seed)
        self.total_steps = steps_of(stage, self.order)
        self.matrix_weights = matrix_weights(self.encoder.backbone)  # before ZeRO-3 takes them apart
        group = config.group
        bf16_weights = self.encoder.dtype == torch.bfloat16 and (
            torch.cuda.is_available() if group.bf16_weights is None else group.bf16_weights
        )
        tokens = self._micro_batch_tokens(bf16_weights)
        settings = deepspeed_settings(training, group, bf16_weights)
        self.engine = build_engine(self.learner.module, training, settings)
        in_float32 = bf16_weights and group.gradient_dtype == "float32"
        # ZeRO-0 and 1 reduce once a step by themselves.
        once = world_size > 1 and training.zero_stage > 1 and group.reduces_each_step(training.zero_stage)
        reduction = StepReduction(self.engine, in_float32) if once else None
        self.gradients = GradientPass(self.engine, self.learner.objective, rank, world_size, reduction)
        self.watch = LossWatch()
        self.writer = StepWriter(
            config.label, self.total_steps, config.logs if rank == 0 else None,
            training.trackers, config.identity, config.settings,
        )  # fmt: skip
        self.dev: DevScores | None = None
        if training.dev is not None and config.dev_tasks is not None:
            self.dev = DevScores(training.dev, config.dev_tasks, self.encoder, rank, world_size, tokens)
        self.step = 0
        self.reader = BatchReader(
            self.order, self.store, stage.global_batch, self.total_steps, rank, world_size,
            tokens, self.learner.hidden_size, self.learner.lengths,
        )  # fmt: skip

    def _teaching(self) -> dict[str, SourceDistillation] | None:
        """How much each source's teacher counts; None where nothing is distilled."""
        training = self.config.training
        if training.distillation is None:
            return None
        return {
            source.name: training.distillation.of_source(source.name, training.temperature)
            for source in self.config.sources
        }

    def _micro_batch_tokens(self, bf16_weights: bool) -> int:
        """As the config has them, or as many as fit the smallest GPU of the group: all workers cut a batch alike."""
        training, stage, device = self.config.training, self.config.stage, self.encoder.device
        if training.micro_batch_tokens != "auto":
            return training.micro_batch_tokens
        if device.type != "cuda":
            return CPU_TOKENS
        backbone, contract = self.encoder.backbone, self.encoder.contract
        trainer = trainer_of(training, stage, self.config.group, backbone, bf16_weights, self.world_size)
        document_tokens = stage.max_document_tokens or contract.max_document_tokens
        longest = self.learner.longest(document_tokens, stage.negatives)
        groups = -(-stage.global_batch // self.world_size)
        memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
        dist.all_reduce(memory, op=dist.ReduceOp.MIN)
        found = fitting_tokens(shape_of(backbone), trainer, longest, groups, float(memory))
        if self.rank == 0:
            note(self.config.label, f"micro-batches of {found:,} tokens")
        return found

    def resume(self, folder: Path) -> None:
        """Continue after the last checkpoint: weights, optimizer, cursor and metrics so far."""
        state, records = load_checkpoint(self.engine, folder, self._state(), self.config.fingerprint_with)
        self.step = int(state["examples_seen"]) // self.config.stage.global_batch
        if self.rank == 0 and state["world_size"] != self.world_size:
            workers = f"{self.world_size} workers in place of {state['world_size']}"
            note(self.config.label, f"goes on after step {self.step:,} with {workers}")
        if self.dev is not None:
            self.dev.resume(state["dev"], folder)
        self.writer.records = records
        for record in records:
            self.watch.seen(record.loss)

    def run(self) -> str | None:
        """Steps from where we are to the end, with checkpoints, then the model; or why it stopped."""
        if self.rank == 0:
            self.writer.start(self.writer.records)
        if self.dev is not None and not self.dev.points:
            self._score(self.dev)
        while self.step < self.total_steps:
            record, problem = self.train_step()
            if record is None:
                self.reader.close()
                return problem
            if self.dev is not None and self.dev.is_due(self.step, self.total_steps):
                record = replace(record, dev_score=self._score(self.dev))
            self.writer.add(record) if self.rank == 0 else self.writer.records.append(record)
            if self.step % self.config.training.checkpoint_every_steps == 0 and self.step < self.total_steps:
                self.report_checkpoint()
        self.reader.close()
        self.report_model()
        self.writer.close()
        return None

    def _score(self, dev: DevScores) -> float:
        """Score the model on dev tasks, and keep its weights where they are the best so far."""
        point, is_best = dev.measure(self.step)
        if self.rank == 0:
            self.writer.add_dev(point, dev.config.metric, is_best)
        if is_best:
            self._export(dev.best_folder)
        return point.score

    def train_step(self) -> tuple[StepRecord | None, str | None]:
        """One optimizer step over the next ``global_batch`` examples, or why there must be none."""
        started = time.monotonic()
        stage, batch = self.config.stage, self.config.stage.global_batch
        read = self.reader.step(self.step)
        rate = learning_rate(
            self.step, self.total_steps, stage.warmup_steps,
            stage.learning_rate * self.config.learning_rate_scale, stage.schedule,
        )  # fmt: skip
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        before = (self.encoder.tokens.real, self.encoder.tokens.padded)
        losses, real, padded = self._exchange(self._accumulate(read), read.plan, batch, before)
        problem = self.watch.problem(losses, lambda: self.store.ids(read.rows), self.step + 1)
        if problem is not None:
            return None, f"{self.config.label}: {problem}"
        norm = unsharded_gradient_norm(self.engine)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm()) if norm is None else norm
        self.step += 1
        seconds = time.monotonic() - started
        tokens = sum(map(sum, read.lengths))
        return StepRecord(
            self.step, (self.step * batch - 1) // self.order.epoch_size, sum(losses) / batch, rate,
            norm, batch, tokens, 1 - real / padded,
            round(read.plan.imbalance, 4), round(seconds, 4), peak_memory_mib(self.encoder.device),
            self._mfu(read.lengths, tokens, seconds),
        ), None  # fmt: skip

    def _accumulate(self, read: StepBatch) -> torch.Tensor:
        """Gradients of this rank's groups; returns its losses, in the plan's order."""
        # Dropout must not depend on how often a run was restarted.
        torch.manual_seed(hash((self.config.seed, self.step, self.rank)) & 0x7FFF_FFFF)
        return self.gradients.run(read.own, read.plan.counts, read.first)

    def _exchange(
        self, losses: torch.Tensor, plan: BatchPlan, batch: int, before: tuple[int, int]
    ) -> tuple[list[float], float, float]:
        """Every rank's losses by position in the batch, and real and padded tokens of all ranks."""
        shared = torch.zeros(batch + 2, dtype=torch.float64, device=self.encoder.device)
        positions = [position for part in plan.ranks[self.rank] for position in part]
        shared[torch.tensor(positions, dtype=torch.long, device=shared.device)] = losses.to(shared)
        shared[batch] = self.encoder.tokens.real - before[0]
        shared[batch + 1] = self.encoder.tokens.padded - before[1]
        dist.all_reduce(shared)
        values = shared.tolist()
        return values[:batch], values[batch], values[batch + 1]

    def _mfu(self, lengths: list[list[int]], tokens: int, seconds: float) -> float | None:
        peak = peak_flops(self.encoder.device, self.encoder.dtype)
        if peak is None:
            return None
        config = self.encoder.backbone.config
        squared = sum(length * length for own in lengths for length in own)
        weights, frozen = self.matrix_weights
        flops = training_flops(tokens, squared, weights, config.num_hidden_layers, config.hidden_size, frozen)
        return round(flops / (seconds * peak * self.world_size), 4)

    def _state(self) -> dict[str, Any]:
        return {
            "examples_seen": self.step * self.config.stage.global_batch,
            "fingerprint": self.config.fingerprint,
            "rounding": self.config.rounding,
            "world_size": self.world_size,
            "zero_stage": self.config.training.zero_stage,
            "dev": self.dev.state() if self.dev is not None else [],
        }

    def report_checkpoint(self) -> None:
        """All ranks save their shards and report them under one name."""
        with temporary_folder() as folder:
            records = self.writer.records if self.rank == 0 else None
            save_checkpoint(self.engine, Path(folder), self._state(), records)
            if self.dev is not None and self.rank == 0:
                self.dev.copy_best(Path(folder))
            self._report(folder, f"step-{self.step:08d}")

    def report_model(self) -> None:
        """Report the finished model folder: that of the last step, or of the best dev score."""
        with temporary_folder() as temporary:
            folder = Path(temporary)
            if self.dev is not None and self.dev.config.keep == "best":
                folder = self.dev.best_folder
            else:
                self._export(folder)
            if self.rank == 0:
                (folder / METRICS_FILE).write_text(metrics_text(self.writer.records))
                if self.dev is not None:
                    self.dev.save(folder)
            self._report(str(folder) if self.rank == 0 else None, MODEL_CHECKPOINT)

    def _export(self, folder: Path) -> None:
        """Gather the weights on rank 0 and write them as a model folder."""
        import deepspeed

        golden = self.learner.golden()
        weights = list(self.learner.module.parameters())
        with deepspeed.zero.GatheredParameters(weights, enabled=self.config.training.zero_stage == 3):
            if self.rank == 0:
                self.learner.save(folder, golden)

    def _report(self, folder: str | None, name: str) -> None:
        import ray.train

        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report({"step": self.step}, checkpoint=checkpoint, checkpoint_dir_name=name)
