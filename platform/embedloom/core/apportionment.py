"""Sharing a whole number out: quotas of synthetic rows, and of a training mix."""

import math
from collections.abc import Collection, Sequence


def largest_remainder(
    exact: Sequence[float], total: int, eligible: Collection[int] | None = None
) -> list[int]:
    """Whole numbers that sum to ``total``: each share rounded down, the rest to the largest remainders, ties to the first.

    Hamilton's method of apportionment.

    Args:
        exact: shares, which sum to ``total`` or, with debts of earlier sharings, about that; a negative one gets nothing.
        total: at least 0.
        eligible: positions that may be rounded up; None or none: all.
    """
    found = [max(0, math.floor(value)) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    candidates = [i for i in by_remainder if eligible is None or i in eligible] or by_remainder
    for turn in range(total - sum(found)):
        found[candidates[turn % len(candidates)]] += 1
    for i in reversed(by_remainder):  # debts cut at zero may have left too much
        found[i] -= min(found[i], max(0, sum(found) - total))
    return found
