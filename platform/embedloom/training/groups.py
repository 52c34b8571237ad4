"""One example as the model sees it: token ids of a query, its positive and its negatives."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Token ids of one example: the query, then the documents, positive first."""

    id: str
    query: list[int]
    documents: list[list[int]]
    query_key: int | None = (
        None  # of the texts as the model sees them, see ``right_answers``; None: of their ids
    )
    document_keys: list[int] | None = None
    right_keys: list[int] | None = None  # of all right answers to the query; None: of its own positive

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text of the group."""
        return [len(self.query), *(len(document) for document in self.documents)]

    @property
    def tokens(self) -> int:
        """Real tokens of the group."""
        return sum(self.lengths)


def compute_cost(lengths: Sequence[int], hidden_size: int) -> float:
    """Work of texts of these lengths, in token units: n (1 + n / 6h) each.

    A Llama layer's matrix products take about 24 h² FLOPs a token and attention 4 h n (n: the text's length), so
    attention adds n / 6h: 2 % at 512 tokens and h = 4096, and 30 % at 512 tokens and h = 288.
    """
    return sum(length * (1 + length / (6 * hidden_size)) for length in lengths)
