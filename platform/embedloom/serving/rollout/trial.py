"""Whether a new version of the model may take over: what was seen of both in a window, and what follows from it.

Pure: windows of numbers in, a decision out. versions.py fills the windows, deploy.py acts on the decisions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import Field

from embedloom.config.base import FrozenConfig

Action = Literal["continue", "promote", "roll_back"]
_ERRORS_AT_ONCE = 3  # so many end a trial before its time; a single one may be an accident


class TrialRules(FrozenConfig):
    """What a new version must keep to while it is watched."""

    watch_seconds: float = Field(default=60.0, ge=0)
    max_error_share: float = Field(default=0.01, ge=0, le=1)  # failed, too late or refused for lack of room
    max_latency_ratio: float = Field(default=1.5, ge=1)  # of its p99 to the live version's
    latency_slack_seconds: float = Field(default=0.05, ge=0)  # a ratio of milliseconds says nothing
    min_overlap: float = Field(default=0.8, ge=0, le=1)  # of nearest neighbours, mean over compared texts
    min_requests: int = Field(default=20, ge=0)  # below it nothing is known
    min_compared: int = Field(default=10, ge=0)


@dataclass(slots=True)
class Side:
    """Requests that one version was asked."""

    requests: int = 0
    errors: int = 0
    seconds: list[float] = field(default_factory=list)  # of the newest answers

    def add(self, other: "Side") -> None:
        """Count what another gateway asked, too."""
        self.requests += other.requests
        self.errors += other.errors
        self.seconds += other.seconds

    def p99(self) -> float:
        """Seconds that 99 of 100 answers stay within; 0 without answers."""
        return float(np.quantile(self.seconds, 0.99)) if self.seconds else 0.0


@dataclass(slots=True)
class Window:
    """What was seen since a trial began."""

    version: str = ""
    live: Side = field(default_factory=Side)
    candidate: Side = field(default_factory=Side)
    compared: int = 0  # texts with neighbours by both versions
    overlap_sum: float = 0.0
    cosine_sum: float = 0.0  # between both versions' vectors of a text; over ``cosines``
    cosines: int = 0
    last_error: str = ""

    @property
    def overlap(self) -> float | None:
        """Mean share of nearest neighbours that both versions agree on."""
        return self.overlap_sum / self.compared if self.compared else None

    @property
    def cosine(self) -> float | None:
        """Mean cosine between the versions' vectors of a text."""
        return self.cosine_sum / self.cosines if self.cosines else None

    @classmethod
    def merged(cls, windows: Sequence["Window"]) -> "Window":
        """What several gateways saw of one trial; those that know of none, or of another, add nothing."""
        version = next((one.version for one in windows if one.version), "")
        total = cls(version=version)
        for one in (own for own in windows if own.version == version):
            total.live.add(one.live)
            total.candidate.add(one.candidate)
            total.compared += one.compared
            total.overlap_sum += one.overlap_sum
            total.cosine_sum += one.cosine_sum
            total.cosines += one.cosines
            total.last_error = one.last_error or total.last_error
        return total

    def summary(self) -> str:
        """One line of it."""
        overlap = (
            "not compared"
            if self.overlap is None
            else f"overlap {self.overlap:.3f} over {self.compared} texts"
        )
        return (
            f"{self.candidate.requests} requests, {self.candidate.errors} errors, p99 "
            f"{1000 * self.candidate.p99():.0f} ms (live {self.live.requests}, {1000 * self.live.p99():.0f} ms), {overlap}"
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why."""

    action: Action
    reason: str


def decide(window: Window, rules: TrialRules, elapsed_seconds: float) -> Decision:
    """Continue, promote or roll back.

    Errors, latency and drift end a trial as soon as they are certain enough; promotion waits for the whole watch, and
    for enough requests: a version that nobody asked has proven nothing.
    """
    over = elapsed_seconds >= rules.watch_seconds
    problem = _errors(window, rules, over) or _latency(window, rules) or _drift(window, rules)
    if problem is not None:
        return Decision("roll_back", problem)
    if not over:
        return Decision("continue", f"{elapsed_seconds:.0f} of {rules.watch_seconds:.0f} s watched")
    if window.candidate.requests < rules.min_requests:
        return Decision(
            "roll_back",
            f"traffic: only {window.candidate.requests} requests were seen, {rules.min_requests} are needed; watch longer, "
            "take a larger share, or lower min_requests",
        )
    if rules.min_overlap > 0 and window.compared < rules.min_compared:
        return Decision(
            "roll_back",
            f"drift: only {window.compared} texts could be compared, {rules.min_compared} are needed; watch longer, or "
            "lower min_compared",
        )
    return Decision("promote", window.summary())


def _errors(window: Window, rules: TrialRules, over: bool) -> str | None:
    errors, requests = window.candidate.errors, window.candidate.requests
    if errors <= rules.max_error_share * requests or (errors < _ERRORS_AT_ONCE and not over):
        return None
    return (
        f"errors: {errors} of {requests} requests failed, allowed are {100 * rules.max_error_share:g} %; "
        f"the last one: {window.last_error}"
    )


def _latency(window: Window, rules: TrialRules) -> str | None:
    if min(len(window.candidate.seconds), len(window.live.seconds)) < max(1, rules.min_requests):
        return None
    own, live = window.candidate.p99(), window.live.p99()
    limit = rules.max_latency_ratio * live + rules.latency_slack_seconds
    if own <= limit:
        return None
    return f"latency: p99 is {1000 * own:.0f} ms, allowed are {1000 * limit:.0f} ms (the live version's is {1000 * live:.0f} ms)"


def _drift(window: Window, rules: TrialRules) -> str | None:
    overlap = window.overlap
    if overlap is None or window.compared < max(1, rules.min_compared) or overlap >= rules.min_overlap:
        return None
    return (
        f"drift: {100 * overlap:.0f} % of nearest neighbours stay the same over {window.compared} texts, "
        f"{100 * rules.min_overlap:.0f} % are wanted"
    )
