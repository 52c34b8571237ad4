"""The training loop of one worker. Ray Train starts one in every process of the group."""

import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from embedloom.config.training import TrainingConfig, TrainingStage
from embedloom.encoder.device import DTypeName
from embedloom.encoder.export import save_model
from embedloom.encoder.model import Encoder
from embedloom.errors import StageError
from embedloom.progress import Progress
from embedloom.storage import Place
from embedloom.training.deepspeed import build_engine
from embedloom.training.examples import ExampleStore
from embedloom.training.gradients import GradientPass
from embedloom.training.groups import Group
from embedloom.training.losses import Objective
from embedloom.training.module import ContrastiveModule
from embedloom.training.order import Indices, balanced_ranks, example_order, micro_batches, one_pass
from embedloom.training.schedule import learning_rate

ENGINE_TAG = "engine"
METRICS_FILE = "metrics.jsonl"
MODEL_CHECKPOINT = "model"


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Everything a worker needs; picklable."""

    label: str
    training: TrainingConfig
    stage: TrainingStage
    shares: dict[str, float]
    seed: int
    learning_rate_scale: float
    dtype: DTypeName
    start_model: Path
    examples: Place
    threads: int


@dataclass(slots=True)
class StepRecord:
    """One line of ``metrics.jsonl``."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    queries: int
    tokens: int
    padding_share: float
    seconds: float


def train_worker(config: LoopConfig) -> None:
    """Train one stage of one candidate and report checkpoints; the last one holds the model folder."""
    import ray.train

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    context = ray.train.get_context()
    trainer = StageTrainer(config, context.get_world_rank(), context.get_world_size())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            if trainer.is_finished(Path(folder)):
                return
            trainer.resume(Path(folder))
    trainer.run()


class StageTrainer:
    """Engine, data order and step counter of one worker."""

    def __init__(self, config: LoopConfig, rank: int, world_size: int) -> None:
        self.config = config
        self.rank = rank
        self.world_size = world_size
        cuda = torch.cuda.is_available()
        self.encoder = Encoder.load(config.start_model, dtype=config.dtype, trainable=True)
        bf16_weights = cuda and self.encoder.dtype == torch.bfloat16
        self.encoder.backbone.train()
        if config.training.freeze_token_embeddings:
            self.encoder.backbone.get_input_embeddings().requires_grad_(False)
        if config.training.gradient_checkpointing:
            self.encoder.backbone.gradient_checkpointing_enable()
        self.store = ExampleStore.open(config.examples, self.encoder, config.stage.negatives)
        self.total_steps, self.order = plan_steps(config, self.store.datasets)
        objective = Objective.of(config.training, self.encoder.dimension, self.encoder.contract.normalize)
        self.engine = build_engine(ContrastiveModule(self.encoder), config.training, bf16_weights)
        self.gradients = GradientPass(self.engine, objective, rank, world_size)
        self.step = 0
        self.records: list[StepRecord] = []

    def is_finished(self, folder: Path) -> bool:
        """Whether a checkpoint is the final one of this stage."""
        return (folder / "config.json").is_file()

    def resume(self, folder: Path) -> None:
        """Continue after the last checkpoint: weights, optimizer, step and metrics so far."""
        _, state = self.engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
        self.step = int(state["step"])
        lines = (folder / METRICS_FILE).read_text().splitlines() if (folder / METRICS_FILE).is_file() else []
        self.records = [StepRecord(**json.loads(line)) for line in lines]

    def run(self) -> None:
        """Steps from where we are to the end, with checkpoints, then the model."""
        progress = Progress(self.config.label, self.total_steps, "steps", done=self.step)
        while self.step < self.total_steps:
            record = self.train_step()
            self.records.append(record)
            if self.rank == 0:
                progress.advance(
                    1, loss=record.loss, lr=record.learning_rate, grad_norm=record.grad_norm,
                    tokens_per_second=round(record.tokens / record.seconds), padding=f"{record.padding_share:.0%}",
                )  # fmt: skip
            if self.step % self.config.training.checkpoint_every_steps == 0 and self.step < self.total_steps:
                self.report_checkpoint()
        self.report_model()

    def train_step(self) -> StepRecord:
        """One optimizer step over the next ``global_batch`` examples."""
        started = time.monotonic()
        stage, batch = self.config.stage, self.config.stage.global_batch
        rows = self.order[self.step * batch : (self.step + 1) * batch].tolist()
        groups = self.store.groups(rows)
        plans = plan_micro_batches(groups, self.world_size, self.config.training.micro_batch_tokens)
        rate = learning_rate(
            self.step, self.total_steps, stage.warmup_steps,
            stage.learning_rate * self.config.learning_rate_scale, stage.schedule,
        )  # fmt: skip
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        before = (self.encoder.tokens.real, self.encoder.tokens.padded)
        counts = [sum(map(len, plan)) for plan in plans]
        own = [[groups[position] for position in positions] for positions in plans[self.rank]]
        loss_sum = float(self.gradients.run(own, counts, groups[:1]).sum())
        self.engine.step()
        self.step += 1
        totals = torch.tensor(
            [loss_sum, self.encoder.tokens.real - before[0], self.encoder.tokens.padded - before[1]],
            dtype=torch.float64,
        )
        totals = totals.to(self.encoder.device)
        dist.all_reduce(totals)
        loss, real, padded = totals[0].item() / batch, totals[1].item(), totals[2].item()
        if not math.isfinite(loss):
            raise StageError(
                f"{self.config.label}: loss is {loss} at step {self.step}; examples {[g.id for g in groups]}"
            )
        return StepRecord(
            self.step, loss, rate, float(self.engine.get_global_grad_norm() or 0.0), batch, int(real),
            1 - real / padded, round(time.monotonic() - started, 4),
        )  # fmt: skip

    def report_checkpoint(self) -> None:
        """All ranks save their shards and report them under one name."""
        with tempfile.TemporaryDirectory(prefix="embedloom-checkpoint-") as folder:
            self.engine.save_checkpoint(folder, tag=ENGINE_TAG, client_state={"step": self.step})
            if self.rank == 0:
                self._write_metrics(Path(folder))
            self._report(folder, f"step-{self.step:08d}")

    def report_model(self) -> None:
        """Gather the weights on rank 0 and report the finished model folder."""
        import deepspeed

        with tempfile.TemporaryDirectory(prefix="embedloom-model-") as folder:
            with deepspeed.zero.GatheredParameters(
                list(self.encoder.backbone.parameters()), enabled=self.config.training.zero_stage == 3
            ):
                if self.rank == 0:
                    save_model(
                        self.encoder.backbone, self.encoder.tokenizer, self.encoder.contract, Path(folder)
                    )
                    self._write_metrics(Path(folder))
            self._report(folder if self.rank == 0 else None, MODEL_CHECKPOINT)

    def _report(self, folder: str | None, name: str) -> None:
        import ray.train

        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        metrics = {
            "step": self.step,
            "loss": self.records[-1].loss,
            "repeated_negatives": self.store.repeated_negatives,
        }
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)

    def _write_metrics(self, folder: Path) -> None:
        lines = [json.dumps(asdict(record)) for record in self.records]
        (folder / METRICS_FILE).write_text("\n".join(lines) + "\n")


def plan_steps(config: LoopConfig, datasets: list[str]) -> tuple[int, Indices]:
    """Number of optimizer steps and the order of all their examples."""
    stage = config.stage
    steps = stage.max_steps
    if steps is None:
        steps = max(1, math.ceil(one_pass(datasets, config.shares) * stage.epochs / stage.global_batch))
    return steps, example_order(datasets, config.shares, steps * stage.global_batch, config.seed)


def plan_micro_batches(groups: list[Group], world_size: int, budget: int) -> list[list[list[int]]]:
    """Positions of the groups, by rank and micro-batch; every rank gets the same number of micro-batches."""
    costs = [group.tokens for group in groups]
    ranks = balanced_ranks(costs, world_size)
    count = max(len(micro_batches([costs[p] for p in own], budget)) for own in ranks)
    return [
        [
            [own[position] for position in batch]
            for batch in micro_batches([costs[p] for p in own], budget, max(1, count))
        ]
        for own in ranks
    ]
