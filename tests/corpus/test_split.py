from hypothesis import given
from hypothesis import strategies as st

from embedloom.config.corpus import SplitConfig
from embedloom.corpus.questions import SPLITS, split_of


def test_shares_are_kept():
    config = SplitConfig(dev=0.1, test=0.2)
    splits = [split_of(f"module{number}", config, seed=42) for number in range(20_000)]
    shares = {name: splits.count(name) / len(splits) for name in SPLITS}
    # Three standard deviations of a share of 0.2 over 20,000 draws are 0.0085.
    assert abs(shares["dev"] - 0.1) < 0.0085 and abs(shares["test"] - 0.2) < 0.0085


@given(st.text(), st.integers(0, 2**31))
def test_a_group_has_one_split_and_no_share_means_train(group, seed):
    config = SplitConfig(dev=0.3, test=0.3)
    assert split_of(group, config, seed) == split_of(group, config, seed)
    assert split_of(group, SplitConfig(dev=0, test=0), seed) == "train"


def test_the_seed_draws_other_groups():
    config = SplitConfig(dev=0.25, test=0.25)
    first, second = ([split_of(f"g{n}", config, seed) for n in range(200)] for seed in (1, 2))
    assert first != second


def test_a_larger_share_only_takes_from_train():
    small, large = SplitConfig(dev=0.1, test=0.1), SplitConfig(dev=0.1, test=0.4)
    for number in range(500):
        before, after = (split_of(f"g{number}", config, 7) for config in (small, large))
        assert before == after or (before, after) == ("train", "test")
