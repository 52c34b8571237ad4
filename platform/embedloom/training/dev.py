"""Scores on development tasks while a stage trains, and which of its states is the best so far.

All workers embed, each its share of the texts in step with the others, because a sharded model answers only where all
take part; rank 0 has the vectors scored. What scores them is handed in: stages never import each other.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from embedloom.config.training import DevScoring
from embedloom.encoder.model import Encoder, Vectors, token_budget_batches

DEV_FILE = "_dev.json"  # merging and other readers of model folders pass over names with _
BEST_FOLDER = "best_model"  # of a checkpoint


class DevBench(Protocol):
    """Loaded tasks."""

    token_ids: list[list[int]]

    def score(self, vectors: Vectors) -> dict[str, float]:
        """Score by task of the vectors of ``token_ids``."""
        ...


class DevTasks(Protocol):
    """Tasks still to load; picklable."""

    def open(self, encoder: Encoder) -> DevBench:
        """Load them, with the texts as this encoder reads them."""
        ...


@dataclass(frozen=True, slots=True)
class DevPoint:
    """Scores of one state of the model."""

    step: int
    score: float  # mean over tasks
    tasks: dict[str, float]


def best_of(points: Sequence[DevPoint]) -> DevPoint | None:
    """The best scored state, the earliest of equals; the untrained start (step 0) is only there to compare with."""
    trained = [point for point in points if point.step > 0]
    return max(trained, key=lambda point: (point.score, -point.step), default=None)


class DevScores:
    """The dev curve of one worker; rank 0 also holds a copy of the best model's folder."""

    def __init__(
        self,
        config: DevScoring,
        tasks: DevTasks,
        encoder: Encoder,
        rank: int,
        world_size: int,
        max_tokens: int,
    ) -> None:
        """Load the tasks on rank 0 and share out their texts; collective.

        Args:
            config: how often, and what to keep.
            tasks: what to score on.
            encoder: of this worker.
            rank: of this worker.
            world_size: workers.
            max_tokens: of a forward.
        """
        self.config = config
        self.points: list[DevPoint] = []
        self._encoder, self._rank, self._world_size = encoder, rank, world_size
        self._bench = tasks.open(encoder) if rank == 0 else None
        shared: list[Any] = [self._bench.token_ids if self._bench is not None else None]
        dist.broadcast_object_list(shared, src=0, device=encoder.device)
        self._token_ids: list[list[int]] = shared[0]
        lengths = [len(ids) for ids in self._token_ids]
        self._batches = token_budget_batches(lengths, max_tokens)
        self._folder = tempfile.TemporaryDirectory(prefix="embedloom-best-")

    @property
    def best_folder(self) -> Path:
        """Rank 0's copy of the best model so far; empty before there is one."""
        return Path(self._folder.name) / BEST_FOLDER

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the model is to be scored after this step."""
        return step == total_steps or step % self.config.every_steps == 0

    def measure(self, step: int) -> tuple[DevPoint, bool]:
        """Score the model as it is; collective.

        Returns:
            The point, and whether its weights are to be kept: the best so far, where the best are wanted.
        """
        vectors = self._embed()
        shared: list[Any] = [None]
        if self._bench is not None and vectors is not None:
            shared = [self._bench.score(vectors)]
        dist.broadcast_object_list(shared, src=0, device=self._encoder.device)
        tasks: dict[str, float] = shared[0]
        point = DevPoint(step, round(math.fsum(tasks.values()) / len(tasks), 6), tasks)
        self.points.append(point)
        return point, self.config.keep == "best" and best_of(self.points) is point

    def state(self) -> list[dict[str, Any]]:
        """The curve, JSON-like."""
        return [asdict(point) for point in self.points]

    def resume(self, state: list[dict[str, Any]], checkpoint: Path) -> None:
        """Go on with the curve and, on rank 0, the best model of a checkpoint."""
        self.points = [DevPoint(**point) for point in state]
        if self._rank == 0 and (checkpoint / BEST_FOLDER).is_dir():
            shutil.copytree(checkpoint / BEST_FOLDER, self.best_folder, dirs_exist_ok=True)

    def copy_best(self, checkpoint: Path) -> None:
        """Put rank 0's best model into a checkpoint, so that it survives this process."""
        if self.best_folder.is_dir():
            shutil.copytree(self.best_folder, checkpoint / BEST_FOLDER)

    def save(self, folder: Path) -> None:
        """Write the curve beside a finished model."""
        best = best_of(self.points)
        content = {
            "metric": self.config.metric,
            "kept": self.config.keep,
            "best_step": best.step if best is not None else None,
            "points": self.state(),
        }
        (folder / DEV_FILE).write_text(json.dumps(content, indent=2) + "\n")

    def _embed(self) -> Vectors | None:
        """Vectors of all texts on rank 0, None elsewhere."""
        encoder, world = self._encoder, self._world_size
        rounds = math.ceil(len(self._batches) / world)
        own = self._batches[self._rank :: world]
        training = encoder.backbone.training
        encoder.backbone.eval()
        parts = []
        with torch.no_grad():
            for number in range(rounds):
                # A worker without a batch left keeps the others company: forwards of a sharded model are collective.
                batch = own[number] if number < len(own) else self._batches[0][:1]
                vectors = encoder.forward([self._token_ids[position] for position in batch])
                parts += [vectors] if number < len(own) else []
        encoder.backbone.train(training)
        return self._gathered(parts)

    def _gathered(self, parts: list[torch.Tensor]) -> Vectors | None:
        positions = [
            [position for batch in self._batches[rank :: self._world_size] for position in batch]
            for rank in range(self._world_size)
        ]
        most = max(map(len, positions))
        padded = torch.zeros(most, self._encoder.dimension, device=self._encoder.device)
        done = 0
        for part in parts:
            padded[done : done + len(part)] = part
            done += len(part)
        received = [torch.empty_like(padded) for _ in positions] if self._rank == 0 else None
        dist.gather(padded, received, dst=0)
        if received is None:
            return None
        found: Vectors = np.empty((len(self._token_ids), padded.shape[1]), dtype=np.float32)
        for own, rows in zip(positions, received, strict=True):
            found[own] = rows[: len(own)].cpu().numpy()
        return found


def read_dev(folder: Path) -> dict[str, Any] | None:
    """The dev curve of a finished model; None where it was trained without."""
    path = folder / DEV_FILE
    content: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return content
