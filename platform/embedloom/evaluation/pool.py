"""Scheduling (model, task) units over a pool of Ray actors, each with one model warm."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from embedloom.config.resources import PoolConfig
from embedloom.errors import StageError
from embedloom.evaluation.results import Outcome, Scorer, Unit
from embedloom.progress import note

_ATTEMPTS = 2  # of a unit whose actor died
_PLACEMENT_SECONDS = 600.0


class ScoringActor(Protocol):
    """What the pool asks of its actors."""

    def ready(self) -> None:
        """Return once the actor runs."""

    def score(self, unit: Unit) -> Outcome:
        """Compute one result."""
        ...


def next_unit(pending: Sequence[Unit], loaded: Scorer | None, elsewhere: Iterable[Scorer]) -> Unit:
    """The unit an idle actor takes: of its loaded model, else of a model nobody has loaded, else any."""
    taken = set(elsewhere)
    own = (unit for unit in pending if unit.scorer == loaded)
    fresh = (unit for unit in pending if unit.scorer not in taken)
    return next(own, None) or next(fresh, None) or pending[0]


class ScoringPool:
    """Up to ``pool.max_actors`` actors; those the cluster cannot place are simply not used."""

    def __init__(
        self, actor: Callable[..., ScoringActor], arguments: tuple[Any, ...], pool: PoolConfig, size: int
    ) -> None:
        """Ask Ray for the actors.

        Args:
            actor: class of the actors, called with ``arguments``.
            arguments: picklable.
            pool: how many actors, and what each reserves.
            size: number of units; more actors than that are not started.
        """
        self._actor = actor
        self._arguments = arguments
        self._pool = pool
        self._options = {
            "num_cpus": pool.cpus,
            "num_gpus": pool.gpus or None,
            "memory": int(pool.memory_gib * 2**30) or None,
        }
        self._actors: dict[int, Any] = {}
        self._loaded: dict[int, Scorer | None] = {}
        self._running: dict[Any, tuple[int, Unit | None]] = {}
        for index in range(min(size, pool.max_actors)):
            self._start(index)

    def _start(self, index: int) -> None:
        self._actors[index] = ray.remote(self._actor).options(**self._options).remote(*self._arguments)
        self._loaded[index] = None
        self._running[self._actors[index].ready.remote()] = (index, None)

    def run(self, units: Sequence[Unit], save: Callable[[Unit, Outcome], None]) -> dict[Unit, str]:
        """Score every unit and hand each outcome to ``save``; returns the failures with their reasons.

        Raises:
            StageError: no actor started.
        """
        pending = list(units)
        attempts = dict.fromkeys(units, 0)
        failures: dict[Unit, str] = {}
        while pending or any(unit is not None for _, unit in self._running.values()):
            index, unit, outcome, error = self._wait()
            if isinstance(error, RayActorError):
                if unit is None:
                    raise StageError(f"evaluate: an actor did not start: {_last_line(error)}") from error
                attempts[unit] += 1
                self._start(index)
                if attempts[unit] < _ATTEMPTS:
                    note("evaluate", f"{unit.label}: its actor died, trying again")
                    pending.insert(0, unit)
                    continue
            if unit is not None and outcome is not None:
                save(unit, outcome)
            elif unit is not None:
                failures[unit] = _last_line(error)
                note("evaluate", f"{unit.label} failed: {failures[unit]}")
            if pending and not isinstance(error, RayActorError):
                self._assign(index, pending)
        return failures

    def _assign(self, index: int, pending: list[Unit]) -> None:
        others = [scorer for other, scorer in self._loaded.items() if other != index and scorer is not None]
        unit = next_unit(pending, self._loaded[index], others)
        pending.remove(unit)
        self._loaded[index] = unit.scorer
        self._running[self._actors[index].score.remote(unit)] = (index, unit)

    def _wait(self) -> tuple[int, Unit | None, Outcome | None, BaseException | None]:
        """What finishes next: the actor's number, the unit (None: it only started), result or error."""
        while True:
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=_PLACEMENT_SECONDS)
            if done:
                break
            if all(unit is None for _, unit in self._running.values()):
                raise StageError(
                    f"evaluate: no actor could be placed in {_PLACEMENT_SECONDS:.0f} s; each needs "
                    f"{self._pool.cpus:g} CPUs, {self._pool.gpus:g} GPUs and {self._pool.memory_gib:g} GiB; "
                    f"the cluster has {ray.cluster_resources()}"
                )
        index, unit = self._running.pop(done[0])
        try:
            return index, unit, ray.get(done[0]), None
        except Exception as error:  # whatever mteb, a dataset or the model raised: reported, the rest goes on
            return index, unit, None, error

    def close(self) -> None:
        """Stop all actors."""
        for actor in self._actors.values():
            ray.kill(actor)


def _last_line(error: BaseException | None) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"
