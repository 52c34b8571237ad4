import numpy as np
import pytest
import torch

from embedloom.errors import ConfigError, DataError
from embedloom.training.losses import get_loss
from embedloom.training.losses.infonce import infonce


def test_infonce_equals_a_float64_computation_by_hand():
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(3, 4)), rng.normal(size=(3, 5, 4))
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    documents /= np.linalg.norm(documents, axis=-1, keepdims=True)
    expected = []
    for query, group in zip(queries, documents, strict=True):
        powers = np.exp(group @ query / 0.05)
        expected.append(-np.log(powers[0] / powers.sum()))
    found = infonce(torch.tensor(queries), torch.tensor(documents), 0.05)
    assert found.numpy() == pytest.approx(np.array(expected), rel=1e-12)


def test_infonce_of_a_query_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    queries, documents = torch.randn(4, 8), torch.randn(4, 3, 8)
    together = infonce(queries, documents, 0.1)
    alone = torch.cat([infonce(queries[i : i + 1], documents[i : i + 1], 0.1) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_infonce_names_both_shapes():
    with pytest.raises(DataError, match=r"\(2, 4\).*\(3, 2, 4\)"):
        infonce(torch.zeros(2, 4), torch.zeros(3, 2, 4), 0.1)


def test_unknown_loss_lists_the_allowed():
    with pytest.raises(ConfigError, match="'gecko2' is unknown; allowed: infonce"):
        get_loss("gecko2")
