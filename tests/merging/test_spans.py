"""Methods that are weighted sums: against the published formulas over whole tensors in float64, and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedloom.errors import DataError
from embedloom.merging import methods, tensors
from fakes_merging import merge_arrays

ORTHOGONAL = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def random_models(count, size=400, seed=0, spread=1.0):
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(size)
    return base, [base + spread * generator.standard_normal(size) for _ in range(count)]


def multislerp_by_formula(models, weights, eps=1e-12):
    """mergekit's multislerp, step by step: unit tensors, tangent plane at their mean, exponential map, mean length."""
    weights = np.array(weights) / np.sum(weights)
    lengths = [np.linalg.norm(model) for model in models]
    units = [model / length for model, length in zip(models, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    size = np.linalg.norm(tangent) + eps
    point = mean * math.cos(size) + tangent * (math.sin(size) / size)
    return point * (weights @ np.array(lengths))


def karcher_by_formula(models, weights, steps=200):
    weights = np.array(weights) / np.sum(weights)
    units = [model / np.linalg.norm(model) for model in models]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for weight, unit in zip(weights, units, strict=True):
            angle = math.acos(min(1.0, mean @ unit))
            tangent += (
                weight * (angle / math.sin(angle) if angle > 1e-9 else 1.0) * (unit - (mean @ unit) * mean)
            )
        size = np.linalg.norm(tangent)
        if size < 1e-12:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        mean /= np.linalg.norm(mean)
    return mean * sum(w * np.linalg.norm(m) for w, m in zip(weights, models, strict=True))


def model_stock_by_formula(models, base):
    deltas = [model - base for model in models]
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(deltas) for b in deltas[i + 1 :]
    ]
    cosine, count = np.mean(cosines), len(models)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return ratio * np.mean(models, axis=0) + (1 - ratio) * base


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_linear_is_close_to_the_float64_mean(tmp_path_factory, seed, weights):
    _, models = random_models(len(weights), seed=seed)
    models = [model.astype(np.float32) for model in models]
    merged = merge_arrays(tmp_path_factory.mktemp("m"), "linear", models, tuple(weights))
    assert merged.dtype == np.float32
    expected = np.average(np.array(models, dtype=np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("method", ["linear", "slerp", "multislerp", "karcher"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.0, 0.0)])
def test_a_model_with_itself_is_itself(tmp_path, method, weights):
    model = random_models(1)[1][0]
    merged = merge_arrays(tmp_path, method, [model, model], weights)
    assert np.array_equal(merged, model.astype(np.float32))


@pytest.mark.parametrize("method", ["linear", "multislerp", "karcher"])
def test_order_of_models_does_not_matter(tmp_path, method):
    _, models = random_models(3)
    left = merge_arrays(tmp_path, method, models, (0.5, 0.3, 0.2))
    right = merge_arrays(tmp_path, method, models[::-1], (0.2, 0.3, 0.5))
    np.testing.assert_allclose(left, right, atol=1e-6)


def test_slerp_by_hand(tmp_path):
    # a quarter circle from (2, 0) to (0, 2), a third of the way: 30 degrees, length 2
    merged = merge_arrays(tmp_path, "slerp", [[2.0, 0.0], [0.0, 2.0]], (2, 1))
    np.testing.assert_allclose(merged, [2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)], rtol=1e-6)


def test_slerp_endpoints_and_straight_lines(tmp_path):
    _, (a, b) = random_models(2)
    for weights, expected in (((1, 0), a), ((0, 1), b)):
        np.testing.assert_allclose(
            merge_arrays(tmp_path, "slerp", [a, b], weights), expected, rtol=2e-6, atol=1e-7
        )
    opposite = merge_arrays(tmp_path, "slerp", [[1.0, 2.0], [-1.0, -2.0]], (3, 1))
    np.testing.assert_allclose(opposite, [0.5, 1.0])
    np.testing.assert_allclose(merge_arrays(tmp_path, "slerp", [[0.0, 0.0], [2.0, 4.0]], (1, 1)), [1.0, 2.0])


def test_slerp_keeps_the_length_between_near_models():
    angle = 0.001  # the cosine is 0.9999995, where a straight line would still do, and the arc is exact
    products = np.array([[1.0, math.cos(angle)], [math.cos(angle), 1.0]])
    a, b = methods.slerp_coefficients(products, 0.5)
    assert math.isclose(a, b, rel_tol=1e-9)
    assert math.isclose(a * a + b * b + 2 * a * b * math.cos(angle), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_spherical_methods_equal_their_formulas(tmp_path, spread):
    _, models = random_models(4, spread=spread)
    weights = (0.4, 0.3, 0.2, 0.1)
    for method, formula in (("multislerp", multislerp_by_formula), ("karcher", karcher_by_formula)):
        expected = formula([m.astype(np.float32).astype(np.float64) for m in models], weights)
        np.testing.assert_allclose(
            merge_arrays(tmp_path, method, models, weights), expected, rtol=3e-6, atol=3e-6
        )


def test_spherical_means_by_hand(tmp_path):
    # three orthogonal directions of lengths 1, 2 and 3: the centre of the octant, at the mean length 2
    models = ORTHOGONAL * np.array([[1.0], [2.0], [3.0]])
    for method in ("multislerp", "karcher"):
        np.testing.assert_allclose(
            merge_arrays(tmp_path, method, models), np.full(3, 2 / math.sqrt(3)), rtol=1e-6
        )


def test_the_karcher_mean_minimises_squared_angles():
    generator = np.random.default_rng(3)
    models = generator.standard_normal((3, 5)) + 1.0
    weights = np.array([0.6, 0.3, 0.1])
    units = models / np.linalg.norm(models, axis=1, keepdims=True)

    def spread(point):
        return float(weights @ np.arccos(np.clip(units @ point / np.linalg.norm(point), -1, 1)) ** 2)

    mean = np.array(methods.karcher_coefficients(models @ models.T, list(weights))) @ models
    assert all(spread(mean) <= spread(mean + 1e-3 * generator.standard_normal(5)) for _ in range(200))


def test_zero_and_cancelling_tensors(tmp_path):
    zeros = np.zeros(3)
    for method in ("slerp", "multislerp", "karcher"):
        assert not merge_arrays(tmp_path, method, [zeros, zeros]).any()
    one = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(merge_arrays(tmp_path, "multislerp", [one, -one], (3, 1)), one, rtol=1e-6)
    assert not merge_arrays(tmp_path, "multislerp", [one, -one], (1, 1)).any()  # the straight line's middle
    three = [ORTHOGONAL[0], -ORTHOGONAL[0], ORTHOGONAL[1] * 0]
    with pytest.raises(DataError, match="'w': the models' directions cancel out"):
        merge_arrays(tmp_path, "multislerp", three, (1, 1, 1))


def test_task_arithmetic_by_hand(tmp_path):
    # 1 + 2 x (1 x (3 - 1) - 0.5 x (5 - 1)) = 1; 10 + 2 x (1 x (12 - 10) - 0.5 x (10 - 10)) = 14
    merged = merge_arrays(
        tmp_path, "task_arithmetic", [[3.0, 12.0], [5.0, 10.0]], (1.0, -0.5), [1.0, 10.0], scale=2.0
    )
    np.testing.assert_allclose(merged, [1.0, 14.0])


def test_task_arithmetic_with_equal_weights_is_the_average(tmp_path):
    base, models = random_models(3)
    merged = merge_arrays(tmp_path, "task_arithmetic", models, None, base)
    np.testing.assert_allclose(merged, np.mean(models, axis=0), atol=1e-6)


def test_model_stock_by_hand_and_formula(tmp_path):
    # task vectors (1, 0) and (1, 1): cos = 1/sqrt(2), t = 2 cos / (1 + cos)
    cosine = 1 / math.sqrt(2)
    ratio = 2 * cosine / (1 + cosine)
    merged = merge_arrays(tmp_path, "model_stock", [[6.0, 7.0], [6.0, 8.0]], None, [5.0, 7.0])
    np.testing.assert_allclose(merged, [5 + ratio, 7 + ratio / 2], rtol=1e-6)
    base, models = random_models(4, spread=0.1)
    shared = np.random.default_rng(9).standard_normal(base.size)
    models = [model + 0.2 * shared for model in models]
    merged = merge_arrays(tmp_path, "model_stock", models, None, base)
    np.testing.assert_allclose(merged, model_stock_by_formula(models, base), atol=1e-6)


def test_model_stock_where_the_formula_has_no_value(tmp_path):
    base = np.array([1.0, 2.0])
    assert np.array_equal(merge_arrays(tmp_path, "model_stock", [base, base], None, base), base)
    assert methods.interpolation(np.array([[1.0, -1.0], [-1.0, 1.0]])) == 0.0


@pytest.mark.parametrize(
    ("method", "weights"), [("linear", (0.5, 0.3, 0.2)), ("karcher", (0.5, 0.3, 0.2)), ("model_stock", None)]
)
def test_blocks_and_threads_change_nothing(tmp_path, monkeypatch, method, weights):
    base, models = random_models(3, size=10_001)
    base = base if method == "model_stock" else None
    monkeypatch.setattr(tensors, "_BLOCK", 2**20)
    whole = merge_arrays(tmp_path, method, models, weights, base)
    monkeypatch.setattr(tensors, "_BLOCK", 2**12)
    one = merge_arrays(tmp_path, method, models, weights, base)
    assert np.array_equal(one, merge_arrays(tmp_path, method, models, weights, base, threads=3))
    np.testing.assert_allclose(whole, one, atol=1e-7)
