"""Token-budget batches: texts of like length together, as many as the budget holds. Pure functions.

Padding, not attention, is what short-text encoders waste (attention is 2 % of the FLOPs at 512 tokens), and a
row count as batch size makes both memory and time depend on the longest text of an unlucky draw.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedloom.errors import DataError

# What torch says when the allocator of the CPU, or oneDNN's, got nothing; CUDA has its own type of error.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
)


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
class MemoryLimit:
    """Padded tokens that were found to fit into memory; no limit until a batch did not."""

    tokens: int = sys.maxsize


def run_batches(
    lengths: Sequence[int],
    max_batch_tokens: int,
    limit: MemoryLimit,
    work: Callable[[list[int]], None],
) -> None:
    """Call ``work`` on token-budget batches of all positions; one that does not fit into memory is cut in half.

    The half stays the limit, for the batches that follow and for later calls: memory that was short once will be
    short again, and every attempt costs a failed forward.

    Args:
        lengths: token count of each text.
        max_batch_tokens: padded tokens per batch.
        limit: lowered where memory runs out.
        work: gets positions into ``lengths``; must not have done anything lasting when it raises.

    Raises:
        DataError: a single text does not fit.
    """
    rest = list(range(len(lengths)))
    while rest:
        budget = min(max_batch_tokens, limit.tokens)
        planned = token_budget_batches([lengths[position] for position in rest], budget)
        failed: list[int] = []
        done = 0
        for batch in planned:
            positions = [rest[index] for index in batch]
            if failed := [] if _fits(work, positions) else positions:
                break
            done += 1
        if len(failed) == 1:
            raise DataError(
                f"a text of {lengths[failed[0]]:,} tokens does not fit into memory even alone; "
                "lower encoder.max_document_tokens, or give the process more memory"
            )
        if failed:
            limit.tokens = lengths[failed[0]] * len(failed) // 2
        rest = [rest[index] for batch in planned[done:] for index in batch]


def _fits(work: Callable[[list[int]], None], positions: list[int]) -> bool:
    try:
        work(positions)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or numpy means that memory ran out."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


@dataclass(slots=True)
class TokenCount:
    """Real and padded tokens seen so far."""

    real: int = 0
    padded: int = 0

    def add(self, lengths: Sequence[int], packed: bool = False, filler: int = 0) -> None:
        """Count one batch of texts with these lengths; a packed one has no padding but its filler."""
        self.real += sum(lengths)
        self.padded += sum(lengths) + filler if packed else max(lengths, default=0) * len(lengths)

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that was padding, 0 to 1."""
        return 1 - self.real / self.padded if self.padded else 0.0
