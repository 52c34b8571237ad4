import pytest
import torch

from embedloom.encoder.model import pool
from embedloom.errors import ConfigError

HIDDEN = torch.tensor([[[1.0, 1.0], [3.0, 5.0], [100.0, 100.0]], [[100.0, 100.0], [2.0, 2.0], [4.0, 6.0]]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", [[2, 3], [3, 4]]), ("cls", [[1, 1], [2, 2]]), ("last_token", [[3, 5], [4, 6]])],
)
def test_pooling_ignores_padding_on_either_side(pooling, expected):
    assert pool(HIDDEN, MASK, pooling).tolist() == expected


def test_unknown_pooling_lists_the_allowed():
    with pytest.raises(
        ConfigError, match=r"'cls\+attention' is unknown; allowed: mean, cls, last_token, max"
    ):
        pool(HIDDEN, MASK, "cls+attention")
