"""Decisions about a new version, from windows made by hand."""

import pytest

from embedloom.serving.rollout.trial import Side, TrialRules, Window, decide

RULES = TrialRules(watch_seconds=60, min_requests=10, min_compared=5, latency_slack_seconds=0.05)


def window(
    requests: int = 100,
    errors: int = 0,
    seconds: float = 0.02,
    live: float = 0.02,
    compared: int = 50,
    overlap: float = 1.0,
) -> Window:
    return Window(
        "v",
        live=Side(900, 0, [live] * 900),
        candidate=Side(requests, errors, [seconds] * (requests - errors)),
        compared=compared,
        overlap_sum=compared * overlap,
        last_error="boom",
    )


def test_a_sound_version_is_promoted_when_the_watch_is_over_and_not_before():
    assert decide(window(), RULES, 59.9).action == "continue"
    assert decide(window(), RULES, 60.0).action == "promote"


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (window(errors=3), "errors: 3 of 100 requests failed, allowed are 1 %; the last one: boom"),
        # 1.5 x 20 ms + 50 ms
        (window(seconds=0.081), "latency: p99 is 81 ms, allowed are 80 ms (the live version's is 20 ms)"),
        (
            window(overlap=0.7),
            "drift: 70 % of nearest neighbours stay the same over 50 texts, 80 % are wanted",
        ),
    ],
)
def test_errors_latency_and_drift_roll_back_at_once(seen, reason):
    found = decide(seen, RULES, 1.0)
    assert (found.action, found.reason) == ("roll_back", reason)


def test_a_single_error_waits_for_the_end_of_the_watch():
    seen = window(requests=50, errors=1)  # 2 %
    assert decide(seen, RULES, 30).action == "continue"
    assert decide(seen, RULES, 60).reason.startswith("errors: 1 of 50")
    assert decide(window(requests=100, errors=1), RULES, 60).action == "promote"  # 1 % is allowed


def test_what_is_within_the_limits_stays():
    assert decide(window(seconds=0.08, overlap=0.8), RULES, 60).action == "promote"


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (window(requests=9), "only 9 requests were seen"),
        (window(compared=4), "only 4 texts could be compared"),
    ],
)
def test_too_little_evidence_is_no_promotion(seen, words):
    assert decide(seen, RULES, 30).action == "continue"
    found = decide(seen, RULES, 60)
    assert found.action == "roll_back" and words in found.reason


def test_without_a_wanted_overlap_nothing_needs_to_be_compared():
    rules = RULES.model_copy(update={"min_overlap": 0.0})
    assert decide(window(compared=0), rules, 60).action == "promote"


def test_few_answers_say_nothing_of_latency_or_drift():
    assert decide(window(requests=9, seconds=9.0), RULES, 1).action == "continue"
    assert decide(window(compared=4, overlap=0.0), RULES, 1).action == "continue"
