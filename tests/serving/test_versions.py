"""Two versions behind one endpoint: who answers, what is counted, and that a bad version fails no request."""

import asyncio
import time

import numpy as np
import pytest

from embedloom.serving.messages import EncodeJob, EncodeResult, Part, Refusal
from embedloom.serving.rollout.router import MIN_TEXTS, NeighbourStore, TrialOrders, VersionRouter

RNG = np.random.default_rng(0)


class Version:
    """A backend whose vectors are ``turn @ vector of the text``."""

    def __init__(
        self, name: str, turn: np.ndarray | None = None, failure: object = None, seconds: float = 0.0
    ) -> None:
        self.name, self.turn, self.failure, self.seconds = (
            name,
            np.eye(16) if turn is None else turn,
            failure,
            seconds,
        )
        self.jobs: list[EncodeJob] = []

    async def encode(self, job: EncodeJob) -> EncodeResult | Refusal:
        self.jobs.append(job)
        await asyncio.sleep(self.seconds)
        if isinstance(self.failure, Exception):
            raise self.failure
        if isinstance(self.failure, Refusal):
            return self.failure
        rows = [
            np.random.default_rng(int(text.split()[-1])).standard_normal(16) @ self.turn
            for part in job.parts
            for text in part.texts or []
        ]
        return EncodeResult(np.asarray(rows, np.float32), {"query": 1}, "query", self.name, 0.0, 0.0)

    async def tokenize(self, job):
        return [[1]]

    async def describe(self):
        return self.name


def job(number: int, **pins) -> EncodeJob:
    return EncodeJob((Part("query", [f"text {number}"]),), **pins)


def orders(**changes) -> TrialOrders:
    return TrialOrders(**{"version": "v2", "application": "a", "share": 0.25, **changes})


def ask(router: VersionRouter, count: int, **pins) -> list[str]:
    """Which version answered each of so many requests, after all copies are done."""

    async def work() -> list[str]:
        names = []
        for number in range(count):
            names.append((await router.encode(job(number, **pins))).contract_hash)
            await asyncio.sleep(0.0005)
        await asyncio.sleep(0.02)
        return names

    return asyncio.run(work())


def test_the_share_is_exact_and_even():
    router = VersionRouter(Version("live"), 10)
    router.order(orders(), Version("new"))
    assert ask(router, 12) == ["live", "live", "live", "new"] * 3
    window = router.window()
    assert (window.live.requests, window.candidate.requests, window.candidate.errors) == (9, 3, 0)


def test_requests_pinned_to_the_live_weights_stay_there():
    router = VersionRouter(Version("live"), 10)
    router.order(orders(share=1.0), Version("new"))
    assert ask(router, 4, fingerprint="f") == ["live"] * 4
    assert ask(router, 4) == ["new"] * 4


@pytest.mark.parametrize(
    "failure", [RuntimeError("broken"), Refusal("full", "overloaded"), Refusal("x", "model_replaced")]
)
def test_what_the_new_version_fails_at_the_live_one_answers(failure):
    router = VersionRouter(Version("live"), 10)
    router.order(orders(share=0.5), Version("new", failure=failure))
    assert ask(router, 10) == ["live"] * 10
    assert (router.window().candidate.requests, router.window().candidate.errors) == (5, 5)


@pytest.mark.parametrize("shadow", [False, True])
def test_versions_that_are_both_full_say_nothing_of_the_new_one(shadow):
    full = Refusal("full", "overloaded")
    router = VersionRouter(Version("live", failure=full), 10)
    router.order(orders(share=0.5, shadow=shadow), Version("new", failure=full))
    for number in range(10):
        assert asyncio.run(router.encode(job(number))) is full
    window = router.window()
    assert (window.live.requests, window.live.seconds) == (0, [])
    assert (window.candidate.requests, window.candidate.errors) == (0, 0)


def test_a_request_that_needs_more_than_the_new_version_has_is_the_live_ones_and_no_error():
    new = Version("new", failure=Refusal("too long", "overloaded"))
    router = VersionRouter(Version("live", seconds=0.2), 0.3)  # half of it is the new version's
    router.order(orders(share=1.0), new)
    before = time.time()
    assert ask(router, 1, deadline=before + 0.3) == ["live"]
    assert router.window().candidate.errors == 0
    # It is told its own half, so that it refuses what it could not do within it.
    assert new.jobs[0].deadline < before + 0.3


def test_a_copy_has_time_of_its_own_whatever_the_live_answer_took():
    new = Version("new")
    router = VersionRouter(Version("live"), 10)
    router.order(orders(share=0.0, shadow=True), new)
    ask(router, 1, deadline=time.time() - 1)
    assert new.jobs[0].deadline > time.time() + 4


def test_a_new_version_that_hangs_is_given_up_in_half_the_time_of_a_request():
    router = VersionRouter(Version("live"), 0.1)
    router.order(orders(share=1.0), Version("new", seconds=5.0))
    assert ask(router, 1) == ["live"]
    assert "TimeoutError" in router.window().last_error


def test_a_refusal_of_the_input_is_an_answer():
    refusal = Refusal("too long", "context_length_exceeded", "input")
    router = VersionRouter(Version("live"), 10)
    router.order(orders(share=1.0), Version("new", failure=refusal))
    assert asyncio.run(router.encode(job(1))) is refusal
    assert router.window().candidate.errors == 0


def test_shadow_answers_reach_nobody_and_are_compared_without_the_clients_pin():
    new = Version("new")
    router = VersionRouter(Version("live"), 10)
    router.order(orders(share=0.0, shadow=True), new)
    assert ask(router, 100, contract_hash="0123456789abcdef") == ["live"] * 100
    window = router.window()
    assert window.candidate.requests > 50 and all(copy.contract_hash is None for copy in new.jobs)
    assert (
        window.compared > 0 and window.overlap == pytest.approx(1.0) and window.cosine == pytest.approx(1.0)
    )


def test_drift_shows_where_the_new_versions_queries_meet_the_old_vectors():
    turn = np.linalg.qr(RNG.standard_normal((16, 16)))[0]
    router = VersionRouter(Version("live"), 10)
    router.order(orders(share=0.0, shadow=True), Version("new", turn))
    ask(router, 150)
    # Ten of at least 64 by chance; a rotation keeps all neighbours, but not between the two spaces.
    assert router.window().overlap < 0.4
    router.order(orders(version="v3", share=0.0, shadow=True, same_space=False), Version("new", turn))
    ask(router, 150)
    assert router.window().overlap == pytest.approx(1.0)


def test_a_trial_that_nobody_renews_ends():
    now = [0.0]
    router = VersionRouter(Version("live"), 10, clock=lambda: now[0])
    router.order(orders(share=1.0, lease_seconds=5), Version("new"))
    now[0] = 4.0
    assert ask(router, 1) == ["new"]
    router.order(orders(share=1.0, lease_seconds=5), Version("other"))  # renewed; the window goes on
    now[0] = 8.0
    assert router.window().candidate.requests == 1
    now[0] = 9.1
    assert ask(router, 1) == ["live"] and router.window().version == ""


def test_too_few_texts_have_no_neighbours():
    store = NeighbourStore(same_space=True)
    vectors = RNG.standard_normal((MIN_TEXTS - 1, 16)).astype(np.float32)
    for row in vectors:
        store.add(row[None])
    assert store.compare(vectors[:3], vectors[:3]).texts == 0
    store.add(vectors[:1] + 1)
    found = store.compare(vectors[:3], vectors[:3])
    assert (found.texts, found.overlap_sum) == (3, 3.0)


def test_neighbours_are_those_of_a_full_comparison():
    store = NeighbourStore(same_space=True)
    stored = RNG.standard_normal((100, 16)).astype(np.float32)
    for row in stored:
        store.add(row[None])
    one, other = (RNG.standard_normal((4, 16)).astype(np.float32) for _ in range(2))
    expected = 0.0
    for a, b in zip(one, other, strict=True):
        cosine = [[v @ s / np.linalg.norm(v) / np.linalg.norm(s) for s in stored] for v in (a, b)]
        best = [set(np.argsort(scores)[::-1][:10]) for scores in cosine]
        expected += len(best[0] & best[1]) / 10
    assert store.compare(one, other).overlap_sum == pytest.approx(expected)
