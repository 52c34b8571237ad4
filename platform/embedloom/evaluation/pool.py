"""Scheduling jobs over a pool of Ray actors, each with one model warm."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from embedloom.config.resources import PoolConfig
from embedloom.engines.tasks import PLACEMENT_SECONDS, no_place, reserved
from embedloom.errors import StageError, last_line
from embedloom.evaluation.jobs import Job, Outcome, Scorer
from embedloom.progress import note

_ATTEMPTS = 2  # of a job whose actor died


class ScoringActor(Protocol):
    """What the pool asks of its actors."""

    def ready(self) -> None:
        """Return once the actor runs."""

    def work(self, job: Job) -> Outcome:
        """Do one job."""
        ...


def next_job(ready: Sequence[Job], loaded: Scorer | None, elsewhere: Iterable[Scorer]) -> Job:
    """The job an idle actor takes: of its loaded model, else of a model nobody has loaded, else any."""
    taken = set(elsewhere)
    own = (job for job in ready if job.scorer == loaded or job.scorer is None)
    fresh = (job for job in ready if job.scorer not in taken)
    return next(own, None) or next(fresh, None) or ready[0]


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
            size: number of jobs; more actors than that are not started.
        """
        self._actor = actor
        self._arguments = arguments
        self._pool = pool
        self._actors: dict[int, Any] = {}
        self._loaded: dict[int, Scorer | None] = {}
        self._running: dict[Any, tuple[int, Job | None]] = {}
        self._idle: list[int] = []
        self.grow(size)

    def grow(self, size: int) -> None:
        """Start more actors if ``size`` jobs could use them."""
        for index in range(len(self._actors), min(size, self._pool.max_actors)):
            self._start(index)

    def _start(self, index: int) -> None:
        self._actors[index] = ray.remote(self._actor).options(**reserved(self._pool)).remote(*self._arguments)
        self._loaded[index] = None
        self._running[self._actors[index].ready.remote()] = (index, None)

    def run(self, jobs: Sequence[Job], save: Callable[[Job, Outcome], None]) -> dict[Job, str]:
        """Do every job, after the ones it needs, and hand each outcome to ``save``.

        Returns:
            The failures with their reasons; a job whose need failed fails with it.

        Raises:
            StageError: no actor started.
        """
        pending = list(jobs)
        waiting = set(jobs)
        attempts = dict.fromkeys(jobs, 0)
        failures: dict[Job, str] = {}
        while True:
            self._fail_dependants(pending, failures, waiting)
            self._assign(pending, waiting)
            if not pending and all(job is None for _, job in self._running.values()):
                return failures
            index, job, outcome, error = self._wait()
            if isinstance(error, RayActorError):
                if job is None:
                    raise StageError(f"evaluate: an actor did not start: {_last_line(error)}") from error
                attempts[job] += 1
                self._start(index)
                if attempts[job] < _ATTEMPTS:
                    note("evaluate", f"{job.label}: its actor died, trying again")
                    pending.insert(0, job)
                    continue
            else:
                self._idle.append(index)
            if job is not None and outcome is not None:
                save(job, outcome)
            elif job is not None:
                failures[job] = _last_line(error)
                note("evaluate", f"{job.label} failed: {failures[job]}")
            waiting.discard(job)

    def _assign(self, pending: list[Job], waiting: set[Job]) -> None:
        """Give ready jobs to idle actors."""
        while self._idle:
            ready = [job for job in pending if not any(need in waiting for need in job.needs)]
            if not ready:
                return
            index = self._idle.pop(0)
            others = [
                scorer for other, scorer in self._loaded.items() if other != index and scorer is not None
            ]
            job = next_job(ready, self._loaded[index], others)
            pending.remove(job)
            self._loaded[index] = job.scorer or self._loaded[index]
            self._running[self._actors[index].work.remote(job)] = (index, job)

    @staticmethod
    def _fail_dependants(pending: list[Job], failures: dict[Job, str], waiting: set[Job]) -> None:
        for job in list(pending):
            broken = next((need for need in job.needs if need in failures), None)
            if broken is not None:
                pending.remove(job)
                waiting.discard(job)
                failures[job] = f"needs {broken.label}, which failed: {failures[broken]}"

    def _wait(self) -> tuple[int, Job | None, Outcome | None, BaseException | None]:
        """What finishes next: the actor's number, the job (None: it only started), result or error."""
        while True:
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=PLACEMENT_SECONDS)
            if done:
                break
            if all(job is None for _, job in self._running.values()):
                raise no_place("evaluate", "actor", self._pool, ray.cluster_resources())
        index, job = self._running.pop(done[0])
        try:
            return index, job, ray.get(done[0]), None
        except Exception as error:  # whatever mteb, a dataset or the model raised: reported, the rest goes on
            return index, job, None, error

    def close(self) -> None:
        """Stop all actors."""
        for actor in self._actors.values():
            ray.kill(actor)


def _last_line(error: BaseException | None) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {last_line(cause)}"
