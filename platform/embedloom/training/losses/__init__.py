"""Contrastive losses, one file each, all with the signature of ``Loss``. ``b`` queries, ``k`` negatives, ``d`` dimensions."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from embedloom.config.training import TrainingConfig
from embedloom.errors import ConfigError
from embedloom.training.losses.gecko import gecko
from embedloom.training.losses.gemini import gemini
from embedloom.training.losses.infonce import infonce
from embedloom.training.losses.matryoshka import Prefixes
from embedloom.training.losses.qwen3 import qwen3
from embedloom.training.losses.vectors import VectorGroups

# What of the other workers' queries a loss compares with.
Needs = Literal["nothing", "positives", "documents"]


class Loss(Protocol):
    """A loss of some queries of a batch."""

    def __call__(self, own: VectorGroups, batch: VectorGroups, first: int, temperature: float) -> Tensor:
        """Per-query losses [b].

        Args:
            own: the queries whose losses are wanted.
            batch: the whole global batch, in which ``own`` stands at ``first``; of its documents only the
                positives where no more are needed.
            first: position of ``own`` in ``batch``.
            temperature: divides the cosine similarities (arXiv 2511.07025: 0.02).
        """
        ...


LOSSES: dict[str, tuple[Loss, Needs]] = {
    "infonce": (infonce, "nothing"),
    "gecko": (gecko, "positives"),
    "qwen3": (qwen3, "documents"),
    "gemini": (gemini, "positives"),
}


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss with its settings: what the training loop minimises."""

    loss: Loss
    needs: Needs
    temperature: float
    prefixes: Prefixes | None = None

    @classmethod
    def of(cls, config: TrainingConfig, dimension: int, normalize: bool) -> "Objective":
        """The objective of a config, for vectors of ``dimension``.

        Raises:
            ConfigError: unknown loss, or Matryoshka dimensions that do not fit the model.
        """
        loss, needs = get_loss(config.loss)
        if config.loss == "qwen3" and config.qwen3_documents == "positives":
            needs = "positives"
        if config.matryoshka is None:
            return cls(loss, needs, config.temperature)
        sizes = config.matryoshka.dimensions
        if max(sizes) != dimension:
            raise ConfigError(
                f"training.matryoshka.dimensions: {list(sizes)}; the largest must be the model's own, {dimension}"
            )
        weights = config.matryoshka.weights or (1.0,) * len(sizes)
        return cls(loss, needs, config.temperature, Prefixes(sizes, weights, normalize))

    def __call__(self, own: VectorGroups, batch: VectorGroups, first: int) -> Tensor:
        """Per-query losses [b] of the queries that stand at ``first`` in the batch."""
        if self.prefixes is None:
            return self.loss(own, batch, first, self.temperature)
        views = zip(self.prefixes.views(own), self.prefixes.views(batch), strict=True)
        losses = [
            weight * self.loss(cut, cut_batch, first, self.temperature)
            for (weight, cut), (_, cut_batch) in views
        ]
        return sum(losses[1:], losses[0])

    def shared_part(self, own: VectorGroups) -> VectorGroups:
        """What of one worker's groups the others need to see."""
        if self.needs == "documents":
            return own
        return VectorGroups(own.queries, own.documents[:, :1], own.query_keys, own.document_keys[:, :1])


def get_loss(name: str) -> tuple[Loss, Needs]:
    """The loss of a name, and what it compares with.

    Raises:
        ConfigError: unknown name.
    """
    if name not in LOSSES:
        raise ConfigError(f"training.loss: {name!r} is unknown; allowed: {', '.join(sorted(LOSSES))}")
    return LOSSES[name]
