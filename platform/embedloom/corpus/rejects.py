"""Rejects: every row that is left out, with its reason, so that nothing vanishes silently."""

from collections import Counter


class Rejects:
    """Collects rows of the ``rejects`` table and counts them by reason."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self._counts: Counter[str] = Counter()

    def add(self, row_id: str, reason: str, detail: str) -> None:
        """Note one rejected row."""
        self.rows.append({"id": row_id, "reason": reason, "detail": detail})
        self._counts[reason] += 1

    @property
    def counts(self) -> dict[str, int]:
        """Rejected rows by reason, in alphabetical order."""
        return dict(sorted(self._counts.items()))
