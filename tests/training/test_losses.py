"""Every loss against loops over float64 numpy scalars, written from the papers' formulas."""

import math

import numpy as np
import pytest
import torch

from embedloom.config.training import MatryoshkaConfig, TrainingConfig
from embedloom.errors import ConfigError, DataError
from embedloom.training.losses import LOSSES, Objective, Prefixes, VectorGroups, get_loss, text_key

T = 0.07


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def make_groups(queries=5, negatives=2, dimension=6, seed=0, query_keys=None, document_keys=None):
    """Random unit vectors in float64; every text different unless keys say otherwise."""
    rng = np.random.default_rng(seed)
    keys = query_keys or list(range(queries))
    own = document_keys or [[100 * i + k for k in range(1 + negatives)] for i in range(queries)]
    return VectorGroups(
        torch.tensor(unit(rng.normal(size=(queries, dimension)))),
        torch.tensor(unit(rng.normal(size=(queries, 1 + negatives, dimension)))),
        torch.tensor(keys),
        torch.tensor(own),
    )


def by_hand(groups, terms_of):
    """Losses from a function that lists the negative similarities of query i."""
    q, d = groups.queries.numpy(), groups.documents.numpy()
    losses = []
    for i in range(len(q)):
        positive = float(q[i] @ d[i, 0])
        rest = sum(math.exp(s / T) for s in terms_of(i, q, d, positive))
        losses.append(-math.log(math.exp(positive / T) / (math.exp(positive / T) + rest)))
    return losses


def own_negatives(i, q, d):
    return [float(q[i] @ d[i, k]) for k in range(1, d.shape[1])]


def loss_of(name, groups):
    loss, _ = get_loss(name)
    return loss(groups, groups, 0, T).numpy()


def test_infonce_equals_a_float64_computation_by_hand():
    groups = make_groups()
    expected = by_hand(groups, lambda i, q, d, p: own_negatives(i, q, d))
    assert loss_of("infonce", groups) == pytest.approx(expected, rel=1e-12)


def test_infonce_of_a_query_does_not_depend_on_its_batch():
    groups = make_groups()
    alone = np.concatenate([loss_of("infonce", groups.rows(slice(i, i + 1))) for i in range(5)])
    assert loss_of("infonce", groups) == pytest.approx(alone, rel=1e-12)


def test_gecko_equals_a_float64_computation_by_hand():
    groups = make_groups()

    def terms(i, q, d, positive):
        others = [j for j in range(len(q)) if j != i]
        in_batch = [float(q[i] @ d[j, 0]) for j in others] + [float(q[i] @ q[j]) for j in others]
        return own_negatives(i, q, d) + in_batch

    assert loss_of("gecko", groups) == pytest.approx(by_hand(groups, terms), rel=1e-12)


def test_gemini_leaves_out_equal_queries_and_equal_positives():
    # Queries 0 and 1 are one text; queries 2 and 3 have one label as positive.
    document_keys = [[100 * i + k for k in range(3)] for i in range(5)]
    document_keys[3][0] = document_keys[2][0]
    groups = make_groups(query_keys=[7, 7, 2, 3, 4], document_keys=document_keys)
    masked = {(0, 1), (1, 0), (2, 3), (3, 2)}

    def terms(i, q, d, positive):
        kept = [j for j in range(len(q)) if j != i and (i, j) not in masked]
        return own_negatives(i, q, d) + [float(q[i] @ d[j, 0]) for j in kept]

    assert loss_of("gemini", groups) == pytest.approx(by_hand(groups, terms), rel=1e-12)


@pytest.mark.parametrize("spans", ["all", "positives"])
def test_qwen3_masks_by_margin_and_by_equal_document(spans):
    document_keys = [[100 * i + k for k in range(3)] for i in range(6)]
    document_keys[3][0] = document_keys[2][0]  # one positive for two queries
    document_keys[4][2] = document_keys[0][0]  # a negative of query 4 is the positive of query 0
    groups = make_groups(queries=6, document_keys=document_keys)
    keys = groups.document_keys.numpy()
    dropped = []

    def terms(i, q, d, positive):
        found = [(float(q[i] @ d[i, k]), keys[i, k]) for k in range(1, 3)]
        for j in range(len(q)):
            if j == i:
                continue
            found.append((float(q[i] @ q[j]), keys[j, 0]))
            for k in range(3 if spans == "all" else 1):
                found.append((float(d[i, 0] @ d[j, k]), keys[j, k]))
                found.append((float(q[i] @ d[j, k]), keys[j, k]))
        kept = [s for s, key in found if s <= positive + 0.1 and key != keys[i, 0]]
        dropped.append(len(found) - len(kept))
        return kept

    expected = by_hand(groups, terms)
    assert sum(dropped) > 20, "the masks had nothing to do"
    config = TrainingConfig(
        candidates=[{"name": "a", "seed": 0}],
        stages=[{"name": "s", "negatives": 2, "global_batch": 6, "learning_rate": 1e-3}],
        loss="qwen3",
        qwen3_documents=spans,
        temperature=T,
    )
    objective = Objective.of(config, 6, normalize=True)
    found = objective(groups, objective.shared_part(groups), 0)
    assert found.numpy() == pytest.approx(expected, rel=1e-12)


RIGHTS = [[0, 100, 999], [100, 0, 202], [200, -1, -1], [300, 5, -1], [400, 100, -1], [500, -1, -1]]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_loss_takes_another_right_answer_for_a_negative(name):
    """Queries 0 and 1 are one question with two answers; 202 is an own negative of query 2 and right for query 1;
    query 3 shares no answer; query 4 has the positive of query 1 among its answers."""
    document_keys = [[100 * i + k for k in range(3)] for i in range(6)]
    document_keys[5][2] = 500  # an own negative that is the positive
    plain = make_groups(queries=6, query_keys=[7, 7, 2, 3, 4, 5], document_keys=document_keys)
    groups = VectorGroups(
        plain.queries, plain.documents, plain.query_keys, plain.document_keys, torch.tensor(RIGHTS)
    )
    keys, asked = plain.document_keys.numpy(), plain.query_keys.numpy()
    dropped = []

    def terms(i, q, d, positive):
        right = set(RIGHTS[i])
        others = [j for j in range(len(q)) if j != i]
        found = [(float(q[i] @ d[i, k]), keys[i, k] in right) for k in (1, 2)]
        same = {j: asked[j] == asked[i] or keys[j, 0] in right for j in others}
        if name in ("gecko", "gemini"):
            found += [(float(q[i] @ d[j, 0]), same[j]) for j in others]
        if name in ("gecko", "qwen3"):
            found += [(float(q[i] @ q[j]), same[j]) for j in others]
        if name == "qwen3":
            spans = [(j, k, keys[j, k] in right) for j in others for k in range(3)]
            found += [
                (float(side @ d[j, k]), is_right) for j, k, is_right in spans for side in (q[i], d[i, 0])
            ]
            found = [(s, is_right) for s, is_right in found if s <= positive + 0.1]
        dropped.append(sum(is_right for _, is_right in found))
        return [s for s, is_right in found if not is_right]

    expected = by_hand(groups, terms)
    assert sum(dropped) >= (1 if name == "infonce" else 4), "the masks had nothing to do"
    assert loss_of(name, groups) == pytest.approx(expected, rel=1e-12)
    part = get_loss(name)[0](groups.rows(slice(3, 6)), groups, 3, T)
    assert part.numpy() == pytest.approx(expected[3:], rel=1e-12)


@pytest.mark.parametrize("name", ["gecko", "gemini", "qwen3"])
def test_a_row_that_stands_several_times_in_a_batch_is_no_negative_of_itself(name):
    """Three rows in a batch of nine: the loss is that of the three alone, as nothing else is compared with."""
    three = make_groups(queries=3, negatives=0)
    rows = torch.tensor([0, 1, 2] * 3)
    repeated = loss_of(name, three.rows(rows))
    kept = {"gecko": 4, "gemini": 2, "qwen3": 6}[name]
    q, d = three.queries.numpy(), three.documents.numpy()
    for i in range(3):
        others = [j for j in range(3) if j != i]
        scores = [float(q[i] @ d[j, 0]) for j in others]
        scores += [float(q[i] @ q[j]) for j in others] if name != "gemini" else []
        scores += [float(d[i, 0] @ d[j, 0]) for j in others] if name == "qwen3" else []
        assert len(scores) == kept
        positive = float(q[i] @ d[i, 0])
        if name == "qwen3":
            scores = [s for s in scores if s <= positive + 0.1]
        # Every other row stands three times.
        rest = 3 * sum(math.exp(s / T) for s in scores)
        hand = -math.log(math.exp(positive / T) / (math.exp(positive / T) + rest))
        assert repeated[i] == repeated[i + 3] == pytest.approx(hand, rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_of_a_part_are_those_of_the_whole(name):
    groups = make_groups(queries=6)
    loss, _ = get_loss(name)
    part = loss(groups.rows(slice(2, 4)), groups, 2, T)
    assert part.numpy() == pytest.approx(loss_of(name, groups)[2:4], rel=1e-12)


@pytest.mark.parametrize("name", ["gecko", "gemini", "qwen3"])
def test_without_negatives_the_batch_is_what_is_left(name):
    groups = make_groups(negatives=0)
    losses = loss_of(name, groups)
    assert np.isfinite(losses).all() and (losses > 0).all()


def test_matryoshka_sums_the_loss_of_normalised_prefixes():
    groups = make_groups(dimension=8)
    objective = Objective(*get_loss("gecko"), T, Prefixes((8, 3), (1.0, 0.25), normalize=True))
    cut = groups.with_vectors(
        torch.tensor(unit(groups.queries.numpy()[:, :3])),
        torch.tensor(unit(groups.documents.numpy()[..., :3])),
    )
    expected = loss_of("gecko", groups) + 0.25 * loss_of("gecko", cut)
    assert objective(groups, groups, 0).numpy() == pytest.approx(expected, rel=1e-12)


def make_config(**changes):
    return TrainingConfig(
        candidates=[{"name": "a", "seed": 0}],
        stages=[{"name": "s", "negatives": 1, "global_batch": 6, "learning_rate": 1e-3}],
        **changes,
    )


def test_matryoshka_must_train_the_whole_vector():
    config = make_config(matryoshka={"dimensions": [64, 128]})
    with pytest.raises(ConfigError, match=r"\[64, 128\]; the largest must be the model's own, 576"):
        Objective.of(config, 576, normalize=True)


def test_matryoshka_sections_are_checked():
    with pytest.raises(ValueError, match="different"):
        MatryoshkaConfig(dimensions=(64, 64))
    with pytest.raises(ValueError, match="1 weights for 2 dimensions"):
        MatryoshkaConfig(dimensions=(64, 32), weights=(1.0,))


def test_infonce_without_negatives_is_refused():
    with pytest.raises(ValueError, match=r"stages\.s\.negatives is 0 in run 'a', but infonce"):
        TrainingConfig(
            candidates=[{"name": "a", "seed": 0}],
            stages=[{"name": "s", "negatives": 0, "global_batch": 6, "learning_rate": 1e-3}],
        )


def test_shapes_that_do_not_belong_together_are_named():
    with pytest.raises(DataError, match=r"\(2, 4\).*\(3, 2, 4\)"):
        VectorGroups(torch.zeros(2, 4), torch.zeros(3, 2, 4), torch.zeros(2), torch.zeros(3, 2))


def test_text_keys_are_equal_where_token_ids_are():
    assert text_key([1, 2, 3]) == text_key([1, 2, 3]) != text_key([1, 2])
    assert text_key([1, 2, 3]) < 2**63


def test_unknown_loss_lists_the_allowed():
    with pytest.raises(ConfigError, match="'gecko2' is unknown; allowed: gecko, gemini, infonce, qwen3"):
        get_loss("gecko2")
