import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.errors import StageError
from embedloom.synthesis.quotas import Cell, Standing, check_limits, next_attempts, quotas, shares


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, [1.0], [10]),
        (10, [1.0, 1.0], [5, 5]),
        (10, [2.0, 1.0], [7, 3]),  # 6.67 and 3.33: the larger remainder gets the odd one
        (10, [1.0, 1.0, 1.0], [4, 3, 3]),  # equal remainders: the first
        (7, [0.5, 0.3, 0.2], [4, 2, 1]),  # 3.5, 2.1, 1.4
        (2, [5.0, 5.0, 0.001], [1, 1, 0]),
        (1, [1.0, 3.0], [0, 1]),
        (3, [1.0, 0.0], [3, 0]),  # a weight of zero never gets the odd row
    ],
)
def test_shares_by_hand(total, weights, expected):
    assert shares(total, weights) == expected


def test_what_an_earlier_sharing_owes_is_made_good():
    assert shares(1, [1.0, 1.0], [0.5, -0.5]) == [1, 0]  # 0.5 + 0.5 and 0.5 - 0.5
    assert shares(1, [1.0, 1.0], [-0.5, 0.5]) == [0, 1]
    assert shares(2, [1.0, 1.0, 1.0], [-2.0, 1.0, 1.0]) == [0, 1, 1]  # a debt never goes below nothing


@given(total=st.integers(0, 10_000), weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_shares_sum_up_and_are_within_one_of_the_exact_share(total, weights):
    found = shares(total, weights)
    assert sum(found) == total
    for share, weight in zip(found, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) <= 1 + 1e-6


@given(
    rows=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=6),
    languages=st.lists(st.floats(0.05, 10), min_size=1, max_size=5),
)
def test_every_family_is_exact_and_every_generator_within_a_row_over_all_families(rows, weights, languages):
    families = {f"f{n}": count for n, count in enumerate(rows)}
    generators = {f"g{n}": weight for n, weight in enumerate(weights)}
    spoken = {f"l{n}": weight for n, weight in enumerate(languages)}
    cells = quotas(families, generators, dict.fromkeys(families, spoken))
    assert all(count > 0 for count in cells.values())
    for family, count in families.items():
        own = {cell: n for cell, n in cells.items() if cell.family == family}
        assert sum(own.values()) == count
        for language, weight in spoken.items():
            exact = count * weight / sum(languages)
            assert abs(sum(n for cell, n in own.items() if cell.language == language) - exact) <= 2
    for generator, weight in generators.items():
        exact = sum(rows) * weight / sum(weights)
        found = sum(n for cell, n in cells.items() if cell.generator == generator)
        # One row, plus what a generator whose debt was cut at zero could not give back.
        assert abs(found - exact) <= max(1, len(weights) - 1) + 1e-6


def test_quotas_of_many_tiny_families_keep_to_the_weights():
    families = {f"f{n}": 1 for n in range(12)}
    cells = quotas(families, {"a": 3.0, "b": 1.0}, {key: {"eng": 1.0} for key in families})
    assert sum(n for cell, n in cells.items() if cell.generator == "a") == 9


def test_round_zero_asks_the_quota_and_later_rounds_the_deficit_by_the_acceptance():
    assert next_attempts(Standing(100), 1, 4) == 100
    assert next_attempts(Standing(100), 3, 4) == 34
    assert next_attempts(Standing(100), 1, 4, expected_acceptance=0.8) == 125
    # 60 of 100 kept: (60 + 1) / (100 + 2) = 0.598; 40 x 1.1 / 0.598 = 73.6
    assert next_attempts(Standing(100, 100, 100, 60), 1, 4) == 74
    assert next_attempts(Standing(100, 100, 100, 100), 1, 4) == 0
    # Nothing kept of 100: 1 / 102, so 11,220 would be asked; 4 x 100 - 100 are left.
    assert next_attempts(Standing(100, 100, 100, 0), 1, 4) == 300
    assert next_attempts(Standing(100, 400, 400, 99), 1, 4) == 0
    assert next_attempts(Standing(100, 100, 100, 0), 1, math.inf) == 11_220


@given(acceptance=st.floats(0.3, 1.0), quota=st.integers(1, 2_000), per_attempt=st.integers(1, 7))
def test_a_steady_generator_fills_its_quota_within_the_limit_in_a_few_rounds(acceptance, quota, per_attempt):
    standing, rounds = Standing(quota), 0
    while more := next_attempts(standing, per_attempt, 8):
        asked = standing.asked + more * per_attempt
        standing = Standing(quota, standing.attempts + more, asked, int(asked * acceptance))
        rounds += 1
    assert standing.deficit == 0 or standing.quota < 4
    assert rounds <= 6


def test_a_cell_at_its_limit_is_named_with_its_reasons():
    cell = Cell("sts", "smollm2", "deu")
    cells = {Cell("sts", "other", "eng"): Standing(5, 5, 5, 5), cell: Standing(10, 40, 40, 2)}
    with pytest.raises(StageError) as caught:
        check_limits(cells, {"sts": 1}, {"sts": 4.0}, {cell: {"truncated": 30, "language": 8}})
    assert str(caught.value) == (
        "synthesize: smollm2, family sts, language deu: 2 of 10 rows kept of 40 asked for "
        "(refused: language 8, truncated 30); synthesis.max_attempts_per_row allows to ask for 4 times the rows"
    )
    check_limits({cell: Standing(10, 39, 39, 2)}, {"sts": 1}, {"sts": 4.0}, {})


def test_a_corpus_that_was_read_to_its_end_says_how_many_rows_it_has():
    cell = Cell("existing_questions", "", "eng")
    with pytest.raises(StageError, match=r"3 of 10 rows kept .*lower the family's rows to 3"):
        check_limits(
            {cell: Standing(10, 40, 40, 3)},
            {"existing_questions": 1},
            {"existing_questions": math.inf},
            {},
            {"existing_questions"},
        )
