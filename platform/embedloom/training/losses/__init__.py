"""Contrastive losses, one file each, all with the signature of ``Loss``. ``b`` queries, ``k`` negatives, ``d`` dimensions."""

from typing import Protocol

from torch import Tensor

from embedloom.errors import ConfigError
from embedloom.training.losses.infonce import infonce


class Loss(Protocol):
    """A loss over the groups of one micro-batch."""

    def __call__(self, queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
        """Per-query losses [b] from queries [b, d] and documents [b, 1 + k, d], the positive first."""
        ...


LOSSES: dict[str, Loss] = {"infonce": infonce}


def get_loss(name: str) -> Loss:
    """The loss of a name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in LOSSES:
        raise ConfigError(f"training.loss: {name!r} is unknown; allowed: {', '.join(sorted(LOSSES))}")
    return LOSSES[name]
