"""TIES and DARE: sign election by hand, trimming against a sort, coins that nothing but the seed changes."""

import numpy as np
import pytest
import torch

from embedloom.merging import tensors
from embedloom.merging.methods import coins, elected_mean
from fakes_merging import merge_arrays


def ties_by_formula(models, base, weights, density, scale=1.0):
    """arXiv 2306.01708, Algorithm 1, over whole tensors in float64."""
    deltas = []
    for model in models:
        delta = model - base
        kept = max(1, int(density * delta.size))
        delta[np.argsort(-np.abs(delta), kind="stable")[kept:]] = 0
        deltas.append(delta)
    weighted = np.array([weight * delta for weight, delta in zip(weights, deltas, strict=True)])
    sign = np.where(weighted.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    share = (np.array(weights)[:, None] * agree).sum(axis=0)
    return base + scale * (weighted * agree).sum(axis=0) / np.where(share == 0, 1, share)


def float32_models(count, size, seed=0):
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(size).astype(np.float32)
    models = [(base + 0.1 * generator.standard_normal(size)).astype(np.float32) for _ in range(count)]
    return base.astype(np.float64), [model.astype(np.float64) for model in models]


def test_sign_election_by_hand():
    # elements: two plus against one larger minus; a tie elects plus; nobody; one alone
    deltas = [[0.2, 1.0, 0.0, 0.0], [0.4, -1.0, 0.0, -3.0], [-0.5, 0.0, 0.0, 0.0]]
    merged = elected_mean([torch.tensor(delta) for delta in deltas], [1.0, 1.0, 1.0])
    torch.testing.assert_close(merged, torch.tensor([0.3, 1.0, 0.0, -3.0]))
    weighted = elected_mean([torch.tensor(delta) for delta in deltas], [1.0, 1.0, 3.0])
    assert weighted[0].item() == pytest.approx(-0.5)  # now 1.5 against 0.6


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_ties_equals_its_formula(tmp_path, density, threads):
    base, models = float32_models(3, 20_000)
    weights = (0.5, 0.3, 0.2)
    merged = merge_arrays(
        tmp_path, "ties", models, weights, base, density=density, scale=1.5, threads=threads
    )
    # differences are taken in float32, as the models are
    rounded = [base + (m.astype(np.float32) - base.astype(np.float32)).astype(np.float64) for m in models]
    np.testing.assert_allclose(merged, ties_by_formula(rounded, base, weights, density, 1.5), atol=2e-6)


def test_one_task_vector_is_trimmed_to_its_largest(tmp_path):
    base = np.zeros(6)
    model = np.array([0.1, -5.0, 2.0, -0.3, 4.0, 0.0])
    np.testing.assert_allclose(
        merge_arrays(tmp_path, "ties", [model], None, base, density=0.5), [0, -5, 2, 0, 4, 0]
    )
    # at least one is kept, and equals of the threshold are all kept
    np.testing.assert_allclose(
        merge_arrays(tmp_path, "ties", [model], None, base, density=0.01), [0, -5, 0, 0, 0, 0]
    )
    alike = np.array([1.0, -1.0, 1.0, 0.5])
    np.testing.assert_allclose(
        merge_arrays(tmp_path, "ties", [alike], None, np.zeros(4), density=0.25), [1, -1, 1, 0]
    )


@pytest.mark.parametrize("quantum", [None, 0.05])
def test_thresholds_are_those_of_a_sort(tmp_path, quantum):
    generator = np.random.default_rng(5)
    model = (generator.standard_normal(5001) * 10.0 ** generator.integers(-20, 3, 5001)).astype(np.float32)
    if quantum is not None:
        model = (np.round(model / quantum) * quantum).astype(np.float32)  # many equal magnitudes, many zeros
    for density in (0.001, 0.2, 0.9):
        kept = max(1, int(density * model.size))
        threshold = np.sort(np.abs(model))[::-1][kept - 1]
        merged = merge_arrays(tmp_path, "ties", [model], None, np.zeros(model.size), density=density)
        assert np.array_equal(merged, np.where(np.abs(model) >= threshold, model, 0))


def test_dare_keeps_the_expectation(tmp_path):
    base, models = float32_models(2, 500)
    runs = [
        merge_arrays(tmp_path, "dare_linear", models, (0.7, 0.3), base, density=0.25, seed=seed)
        for seed in range(200)
    ]
    expected = merge_arrays(tmp_path, "task_arithmetic", models, (0.7, 0.3), base)
    # each element's variance is (1/p - 1) sum (w d)^2
    variance = 3 * sum((w * (m - base)) ** 2 for w, m in zip((0.7, 0.3), models, strict=True))
    assert (np.abs(np.mean(runs, axis=0) - expected) < 5 * np.sqrt(variance / 200) + 1e-6).all()
    kept = np.mean([np.abs(run - base) > 1e-7 for run in runs])
    assert kept == pytest.approx(1 - 0.75**2, abs=0.01)


def test_dare_ties_elects_among_what_is_kept(tmp_path):
    base, models = float32_models(3, 3000)
    merged = merge_arrays(tmp_path, "dare_ties", models, None, base, density=1.0)
    whole = merge_arrays(tmp_path, "ties", models, None, base, density=1.0)
    assert np.array_equal(merged, whole)
    dropped = merge_arrays(tmp_path, "dare_ties", models[:1], None, base, density=0.5, seed=3)
    moved = dropped != base.astype(np.float32)
    assert 0.45 < moved.mean() < 0.55
    np.testing.assert_allclose((dropped - base)[moved], 2 * (models[0] - base)[moved], atol=1e-6)


def test_coins_depend_on_seed_and_position_alone(tmp_path, monkeypatch):
    whole = coins(7, 0, 1000, 0.3)
    for start, stop in ((0, 1), (3, 11), (8, 16), (129, 1000)):
        assert torch.equal(coins(7, start, stop, 0.3), whole[start:stop])
    assert not torch.equal(coins(8, 0, 1000, 0.3), whole)
    base, models = float32_models(2, 10_001)
    first = merge_arrays(tmp_path, "dare_linear", models, None, base, density=0.5, seed=1)
    monkeypatch.setattr(tensors, "_BLOCK", 2**12)
    again = merge_arrays(tmp_path, "dare_linear", models, None, base, density=0.5, seed=1, threads=3)
    assert np.array_equal(first, again)
    other = merge_arrays(tmp_path, "dare_linear", models, None, base, density=0.5, seed=1, name="v")
    assert not np.array_equal(first, other)
    assert coins(1, 0, 10, 1.0).all()
