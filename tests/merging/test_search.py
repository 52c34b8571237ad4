"""Soups and weight searches over a made-up landscape of scores, where the best answer is known."""

import pytest
from pydantic import ValidationError

from embedloom.config.evaluation import EvaluationTask
from embedloom.config.merging import MergeSearch, MergingConfig
from embedloom.errors import ConfigError
from embedloom.merging.search import Scored, difference_interval, search_weights, set_apart, subset_mean

NAMES = ("a", "b", "c")


def landscape(dev, check=None):
    """A scorer from functions of the weights; every check item is the check score and a fixed bit of noise."""
    seen = []

    def score(weights):
        seen.append(weights)
        value = (check or dev)(*weights)
        items = {f"test/default/{n}": value + 0.1 * (n % 5) for n in range(50)}
        return Scored(dev(*weights), value, {"check": items})

    score.seen = seen
    return score


def test_greedy_soup_takes_what_helps_in_the_order_of_dev_scores():
    alone = {"a": 0.50, "b": 0.60, "c": 0.40}
    soups = {("b",): 0.60, ("a", "b"): 0.65, ("a", "b", "c"): 0.55, ("b", "c"): 0.9}  # (b, c) is never tried

    def dev(*weights):
        inside = tuple(name for name, weight in zip(NAMES, weights, strict=True) if weight)
        return alone[inside[0]] if len(inside) == 1 else soups[inside]

    score = landscape(dev)
    result = search_weights(MergeSearch(), NAMES, score)
    assert result["kept"] == result["chosen"] == [0.5, 0.5, 0.0]
    assert result["dev_gain"] == pytest.approx(0.10)
    assert (0.0, 0.5, 0.5) not in score.seen
    assert len(score.seen) == len(set(score.seen))  # nothing is scored twice
    rows = {row["model"]: row for row in result["leave_one_out"]}
    assert set(rows) == {"a", "b"}
    assert rows["a"]["dev_gain"] == pytest.approx(0.05)  # 0.65 with it, 0.60 without
    assert rows["b"]["check_gain"] == pytest.approx(0.15)
    assert rows["b"]["check_interval"] == pytest.approx([0.15, 0.15])


def test_a_gain_that_does_not_hold_on_the_check_is_not_kept():
    def dev(a, b, c):
        return a  # the dev tasks happen to like model a

    def check(a, b, c):
        return 1 - (a - 1 / 3) ** 2 - (b - 1 / 3) ** 2

    result = search_weights(MergeSearch(), NAMES, landscape(dev, check))
    assert result["chosen"] == [1.0, 0.0, 0.0]
    assert result["kept"] == pytest.approx([1 / 3] * 3)
    assert "equal weights are kept" in result["reason"]
    assert result["check_gain"] < 0 < result["dev_gain"]
    assert result["check_interval"][1] < 0


def test_coordinate_search_climbs_to_the_best_weights_within_its_budget():
    target = (0.6, 0.3, 0.1)

    def dev(*weights):
        return 1 - sum((w - t) ** 2 for w, t in zip(weights, target, strict=True))

    search = MergeSearch(kind="weights", rounds=8, max_merges=60)
    score = landscape(dev)
    result = search_weights(search, NAMES, score)
    assert result["kept"] == pytest.approx(target, abs=0.03)
    assert len(score.seen) <= 60
    few = landscape(dev)
    search_weights(MergeSearch(kind="weights", rounds=8, max_merges=9, leave_one_out=False), NAMES, few)
    assert len(few.seen) == 9


def test_a_flat_landscape_keeps_equal_weights():
    result = search_weights(MergeSearch(kind="weights"), NAMES, landscape(lambda *_: 0.5))
    assert result["kept"] == pytest.approx([1 / 3] * 3)
    assert "nothing better" in result["reason"]


def test_searches_that_cannot_be_done_are_refused():
    with pytest.raises(ConfigError, match="needs at least 2 models, found 1"):
        search_weights(MergeSearch(), ("a",), landscape(lambda *_: 0.5))
    with pytest.raises(ConfigError, match=r"max_merges: 4; greedy_soup over 3 models needs at least 9"):
        search_weights(MergeSearch(max_merges=4), NAMES, landscape(lambda *_: 0.5))
    for changes, message in (
        ({"method": "ties"}, "greedy_soup averages, found method ties"),
        ({"weights": (1, 2)}, "search finds the weights"),
        ({"method": "model_stock"}, "model_stock takes no weights"),
    ):
        with pytest.raises(ValidationError, match=message):
            MergingConfig(search=MergeSearch(), **changes)
    with pytest.raises(ValidationError, match="different names"):
        MergeSearch(check_tasks=(EvaluationTask(name="dev"),))


def test_queries_of_the_check_are_never_queries_of_the_search():
    items = {f"dev/en/{n}": float(n % 2) for n in range(200)} | {f"dev/de/{n}": 1.0 for n in range(20)}
    scored = set_apart(MergeSearch(), ({"dev": 0.5}, {"dev": items}))
    kept = scored.check_items["dev"]
    rest = {item: value for item, value in items.items() if item not in kept}
    assert 70 < len(kept) < 150
    assert scored.check == subset_mean(kept)
    assert scored.dev == subset_mean(rest)
    changed = {item: (0.0 if item in kept else value) for item, value in items.items()}
    assert set_apart(MergeSearch(), ({"dev": 0.5}, {"dev": changed})).dev == scored.dev
    # subsets count alike, however many items they have
    assert subset_mean({"s/en/1": 0.0, "s/en/a/b": 1.0, "s/de/1": 1.0}) == 0.75


def test_check_tasks_stand_apart_and_a_task_without_items_needs_them():
    main, items = {"dev": 0.2, "sts": 0.4, "other": 0.9}, {"other": {"test/x/1": 0.9}, "dev": {}, "sts": {}}
    tasks = (EvaluationTask(name="dev"), EvaluationTask(name="sts"))
    scored = set_apart(MergeSearch(tasks=tasks, check_tasks=(EvaluationTask(name="other"),)), (main, items))
    assert (scored.dev, scored.check) == pytest.approx((0.3, 0.9))
    assert scored.check_items == {"other": {"test/x/1": 0.9}}
    with pytest.raises(ConfigError, match="'dev' has 0 scores by query, too few to keep some for the check"):
        set_apart(MergeSearch(tasks=tasks), (main, items))
    folder = MergeSearch(check_tasks=(EvaluationTask(name="folder"),))
    with pytest.raises(
        ConfigError, match="'folder' has no score of its own, only dev, sts, other; name single tasks"
    ):
        set_apart(folder, (main, items))


def test_the_interval_is_that_of_paired_differences():
    left = {f"t/s/{n}": 0.5 + 0.1 * (n % 2) for n in range(400)}
    right = dict.fromkeys(left, 0.5)
    low, high = difference_interval(Scored(0, 0, {"t": left}), Scored(0, 0, {"t": right}))
    # mean 0.05, standard deviation 0.05: 1.96 x 0.05 / sqrt(400) = 0.0049 on either side
    assert low == pytest.approx(0.0451, abs=4e-4)
    assert high == pytest.approx(0.0549, abs=4e-4)
    assert difference_interval(Scored(0, 0, {}), Scored(0, 0, {})) is None
