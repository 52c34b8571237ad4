"""How fast a server that may push back is asked, and what may be spent there: arithmetic over a clock that is passed in."""

from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

_FIRST_LIMIT = 8.0
MOST_PAUSE_SECONDS = 300.0  # whatever Retry-After says; then the server is asked again


@dataclass(slots=True)
class Pace:
    """Requests in flight by additive increase and multiplicative decrease (Chiu and Jain 1989), and when the next may go.

    Args:
        most: requests in flight at most.
        requests_per_minute: None: no limit.
        tokens_per_minute: None: no limit.
    """

    most: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    limit: float = _FIRST_LIMIT
    _lowered_at: float = field(init=False, default=float("-inf"))
    _next_request: float = field(init=False, default=float("-inf"))
    _next_tokens: float = field(init=False, default=float("-inf"))
    _paused_until: float = field(init=False, default=float("-inf"))

    def has_room(self, in_flight: int) -> bool:
        """Whether one more may be in flight."""
        return in_flight < max(1, int(min(self.limit, self.most)))

    def take(self, now: float, tokens: float) -> float:
        """Book a request of about so many tokens; returns the seconds that it has to wait."""
        start = max(now, self._next_request, self._next_tokens, self._paused_until)
        if self.requests_per_minute is not None:
            self._next_request = start + 60 / self.requests_per_minute
        if self.tokens_per_minute is not None:
            self._next_tokens = start + 60 * tokens / self.tokens_per_minute
        return start - now

    def answered(self, booked: float, used: float) -> None:
        """One more for each round of answers; what a request used beside what was booked moves the next."""
        self.limit = min(self.most, self.limit + 1 / self.limit)
        if self.tokens_per_minute is not None:
            self._next_tokens += 60 * (used - booked) / self.tokens_per_minute

    def pushed_back(self, sent: float, now: float, pause: float | None = None) -> None:
        """Half as many, once for all requests that were in flight together; none at all for ``pause`` seconds."""
        if sent > self._lowered_at:
            self.limit = max(1.0, min(self.limit, self.most) / 2)
            self._lowered_at = now
        if pause is not None:
            self._paused_until = max(self._paused_until, now + min(pause, MOST_PAUSE_SECONDS))

    def pause_left(self, now: float) -> float:
        """Seconds until requests may go again."""
        return max(0.0, self._paused_until - now)


def retry_after(header: str | None, wall_clock: float) -> float | None:
    """Seconds that a ``Retry-After`` header asks to wait, a number or a date (RFC 9110 §10.2.3); None where it says nothing.

    Args:
        header: its value.
        wall_clock: seconds since the epoch.
    """
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - wall_clock)
    except ValueError:
        return None


@dataclass(slots=True)
class Account:
    """Money of a capped budget: what was spent, and what requests in flight may cost at most.

    ``claimed`` is what a ledger outside must hold before requests go, so that a process that is killed leaves no more spent
    than it had claimed; it grows in steps, so that few requests wait for the ledger.

    Args:
        budget: None: no cap.
        earlier: claimed by earlier processes.
    """

    budget: float | None
    earlier: float = 0.0
    spent: float = 0.0
    reserved: float = 0.0
    claimed: float = 0.0
    _STEPS = 100

    def holds(self, most: float) -> bool:
        """Whether a request that costs this much at most may be sent."""
        return self.budget is None or self.earlier + self.spent + self.reserved + most <= self.budget

    def reserve(self, most: float) -> bool:
        """Set it aside; returns whether ``claimed`` grew and must be written first."""
        self.reserved += most
        needed = self.spent + self.reserved
        if needed <= self.claimed:
            return False
        step = 0.0 if self.budget is None else self.budget / self._STEPS
        room = needed if self.budget is None else max(needed, self.budget - self.earlier)
        self.claimed = min(needed + step, room)
        return True

    def settle(self, most: float, cost: float) -> None:
        """A reserved request has come to this cost; 0 where the server refused it."""
        self.reserved -= most
        self.spent += cost

    def close(self) -> None:
        """Nothing is in flight: what was claimed and not spent is free again."""
        self.reserved = 0.0
        self.claimed = self.spent
