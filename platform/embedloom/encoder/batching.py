"""Token-budget batches: texts of like length together, as many as the budget holds. Pure functions.

Padding, not attention, is what short-text encoders waste (attention is 2 % of the FLOPs at 512 tokens), and a
row count as batch size makes both memory and time depend on the longest text of an unlucky draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def token_budget_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group positions into batches whose padded size (rows x longest) stays within the budget.

    Longest first, so that a batch too large for memory fails at once and not after an hour. A single text
    longer than the budget gets a batch of its own.

    Args:
        lengths: token count of each text.
        max_batch_tokens: padded tokens per batch.

    Returns:
        Batches of positions into ``lengths``; each position stands in exactly one.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batches: list[list[int]] = []
    for position in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


@dataclass(slots=True)
class TokenCount:
    """Real and padded tokens seen so far."""

    real: int = 0
    padded: int = 0

    def add(self, lengths: Sequence[int], packed: bool = False) -> None:
        """Count one batch of texts with these lengths; a packed one has no padding."""
        self.real += sum(lengths)
        self.padded += sum(lengths) if packed else max(lengths, default=0) * len(lengths)

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that was padding, 0 to 1."""
        return 1 - self.real / self.padded if self.padded else 0.0
