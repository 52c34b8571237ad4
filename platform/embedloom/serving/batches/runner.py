"""The process that has batches computed, one after another: a Serve deployment of the endpoint, which Serve starts again.

All it knows lies in the storage. Each batch is computed by a Ray actor of its own, whose end, by ``kill`` too, takes the actors along
that hold the model; what they had written stays.
"""

import asyncio
import contextlib
import hashlib
import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.util.metrics import Counter, Gauge

from embedloom.config.serving import BatchesConfig
from embedloom.core.storage import Place
from embedloom.errors import EmbedloomError, UserError, one_line
from embedloom.serving.batches.job import BatchJob, Resolve
from embedloom.serving.batches.lines import Counted, left_lines, lines_read, result_lines
from embedloom.serving.batches.objects import ENDED
from embedloom.serving.batches.store import Batch, BatchState, BatchStore, FileStore, NotFound

DEPLOYMENT = "batches"
_LOOK_SECONDS = 1.0  # between two looks at a running batch
_POLL_SECONDS = 5.0  # between two looks for new ones, where nobody says that there is one
_SWEEP_SECONDS = 3600.0
_ATTEMPTS = 5  # of a batch whose actors died or found no place
_WAIT_SECONDS = (5.0, 60.0, 300.0, 900.0)  # before each next one
_EXPIRED = "batch_expired", "This request could not be executed before the completion window expired."
_CANCELLED = "batch_cancelled", "The batch was cancelled before this request was executed."

logger = logging.getLogger("embedloom.serving")


class Job(Protocol):
    """A batch being computed."""

    async def wait(self, seconds: float) -> bool:
        """Whether it is done, after so many seconds at the latest; raises what it raised."""
        ...

    def kill(self) -> None:
        """End it, wherever it is."""
        ...


class Work:
    """Brings batches to their end. No Ray here: ``start`` knows how a batch is computed."""

    def __init__(
        self,
        place: Place,
        limits: BatchesConfig,
        start: Callable[[Batch], Job],
        clock: Callable[[], float],
        look_seconds: float = _LOOK_SECONDS,
        wait_seconds: tuple[float, ...] = _WAIT_SECONDS,
    ) -> None:
        """Build one.

        Args:
            place: of files and batches.
            limits: how long files are kept.
            start: starts computing a batch.
            clock: Unix seconds.
            look_seconds: between two looks at a running batch.
            wait_seconds: before each attempt after the first.
        """
        self.files = FileStore(place, limits, clock)
        self.batches = BatchStore(place, clock)
        self._start = start
        self._clock = clock
        self._look_seconds = look_seconds
        self._wait_seconds = wait_seconds
        self._turns: dict[str, int] = {}
        self._count = itertools.count(1)

    def next(self) -> Batch | None:
        """The batch to be computed: the oldest of the key whose turn was longest ago."""
        found: list[Batch] = []
        for batch in self.batches.open():
            state = self.batches.state(batch)
            if state.status in ENDED:  # killed between saying so and clearing up
                self.batches.tell(batch, state)
            else:
                found.append(batch)
        if not found:
            return None
        batch = min(found, key=lambda one: (self._turns.get(one.owner, 0), one.id))
        self._turns[batch.owner] = next(self._count)
        return batch

    async def bring_to_end(self, batch: Batch) -> None:
        """Compute a batch until it is done, cancelled, expired or cannot be computed."""
        state = self.batches.state(batch)
        counted = Counted(batch.work)
        job: Job | None = None
        rest_until = 0.0
        try:
            while True:
                state = self._looked(batch, state, counted)
                if self.batches.cancelled_at(batch) is not None:
                    return await self._finish(batch, state, counted, "cancelled", job, _CANCELLED)
                if self._clock() >= batch.expires_at:
                    return await self._finish(batch, state, counted, "expired", job, _EXPIRED)
                if self._clock() < rest_until:
                    await asyncio.sleep(self._look_seconds)
                    continue
                try:
                    job = job or self._start(batch)
                    if await job.wait(self._look_seconds):
                        return await self._finish(batch, state, counted, "completed", job)
                except UserError as error:
                    return await self._fail(batch, state, counted, job, error)
                except Exception as error:  # a lost machine, no room, a fault of ours: it may go better later
                    job = None
                    state = state.model_copy(update={"attempts": state.attempts + 1})
                    self.batches.tell(batch, state)
                    logger.warning(
                        "batch %s: attempt %d ended: %s", batch.id, state.attempts, one_line(error, 300)
                    )
                    if state.attempts >= _ATTEMPTS:
                        return await self._fail(batch, state, counted, job, error)
                    rest = self._wait_seconds[min(state.attempts, len(self._wait_seconds)) - 1]
                    rest_until = self._clock() + rest
        finally:
            if job is not None:
                job.kill()

    def _looked(self, batch: Batch, state: BatchState, counted: Counted) -> BatchState:
        """The state with what was computed since."""
        read = lines_read(batch.work)
        if read is None:
            return state
        lines, model = read
        counted.look()
        counts = {"total": lines, "completed": counted.completed, "failed": counted.failed}
        changed = state.model_copy(update={"counts": counts, "model": model, "tokens": counted.tokens})
        if state.status == "validating":
            changed = changed.now("in_progress", self._clock())
        if changed != state:
            self.batches.tell(batch, changed)
        return changed

    async def _fail(
        self, batch: Batch, state: BatchState, counted: Counted, job: Job | None, error: Exception
    ) -> None:
        code = "file_not_found" if isinstance(error, NotFound) else "invalid_file"
        if not isinstance(error, UserError):
            code = "server_error"
        told = isinstance(error, EmbedloomError)
        message = (
            one_line(error) if told else "the batch could not be computed; quote its id when you report it"
        )
        if isinstance(error, NotFound):
            message = f"No such File object: {error}"
        state = state.model_copy(update={"errors": ({"code": code, "message": message},)})
        await self._finish(batch, state, counted, "failed", job, (code, message))

    async def _finish(
        self,
        batch: Batch,
        state: BatchState,
        counted: Counted,
        status: str,
        job: Job | None,
        left: tuple[str, str] | None = None,
    ) -> None:
        """Write the files and say that it is over.

        Args:
            batch: whose end it is.
            state: as far as is known.
            counted: its finished shards.
            status: how it ended.
            job: what computes it, if anything does.
            left: code and message for the requests that were not answered.
        """
        if job is not None:
            job.kill()
        state = self._looked(batch, state, counted)
        if lines_read(batch.work) is not None:
            state = state.now("finalizing", self._clock())
            self.batches.tell(batch, state)
            state = await asyncio.to_thread(self._written, batch, state, left)
        cancelled = self.batches.cancelled_at(batch)
        if cancelled is not None and status == "cancelled":
            state = state.model_copy(update={"at": {**state.at, "cancelling": cancelled}})
        self.batches.tell(batch, state.now(status, self._clock()))

    def _written(self, batch: Batch, state: BatchState, left: tuple[str, str] | None) -> BatchState:
        total, completed, failed = (state.counts[key] for key in ("total", "completed", "failed"))
        expiry = (batch.request.get("output_expires_after") or {}).get("seconds")
        changes: dict[str, Any] = {}
        if completed:
            name = _result_id(batch, "output")
            self.files.add(
                batch.owner,
                f"{batch.id}_output.jsonl",
                result_lines(batch.work, True),
                "batch_output",
                expiry,
                name,
            )
            changes["output_file_id"] = name
        unanswered = total - completed - failed
        if failed or unanswered:
            name = _result_id(batch, "error")
            lines = itertools.chain(
                result_lines(batch.work, False), left_lines(batch.work, batch.id, *(left or ("", "")))
            )
            self.files.add(batch.owner, f"{batch.id}_error.jsonl", lines, "batch_output", expiry, name)
            changes["error_file_id"] = name
            changes["counts"] = {"total": total, "completed": completed, "failed": failed + unanswered}
        return state.model_copy(update=changes)


def _result_id(batch: Batch, which: str) -> str:
    """The id of a batch's file: the same if its runner dies while it is written."""
    digits = batch.id.removeprefix("batch_")
    return f"file-{digits[:12]}{hashlib.blake2b(f'{batch.id}/{which}'.encode(), digest_size=8).hexdigest()}"


class BatchRunner:
    """The deployment; its only method is called by handle, never by HTTP."""

    def __init__(self, limits: BatchesConfig, resolve: Resolve, clock: Callable[[], float]) -> None:
        """Begin with what is open.

        Args:
            limits: where files and batches lie, and how many may be there.
            resolve: finds the model of a batch.
            clock: Unix seconds.
        """
        self._place = Place(limits.folder)
        self._limits = limits
        self._resolve = resolve
        self._work = Work(self._place, limits, self._started, clock)
        # Through Ray's exporter: this process answers no HTTP.
        self._open = Gauge("embedloom_batches_open", "Batches that wait or are computed.")
        self._ended = Counter("embedloom_batches_ended", "Batches that ended.", ("status",))
        self._answered = Counter("embedloom_batch_requests", "Requests of ended batches.", ("outcome",))
        self._woken = asyncio.Event()
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def wake(self) -> None:
        """There is a new batch, or one to be cancelled."""
        self._woken.set()

    async def check_health(self) -> None:
        """Serve starts the process again where the loop ended, which it never should."""
        if self._running.done():
            raise RuntimeError("the loop over batches ended") from self._running.exception()

    async def _run(self) -> None:
        swept = -_SWEEP_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            try:
                if loop.time() - swept >= _SWEEP_SECONDS:
                    await asyncio.to_thread(self._work.files.sweep)
                    await asyncio.to_thread(self._work.batches.sweep, self._limits.file_days)
                    swept = loop.time()
                self._open.set(len(await asyncio.to_thread(self._work.batches.open)))
                batch = await asyncio.to_thread(self._work.next)
                if batch is not None:
                    await self._work.bring_to_end(batch)
                    self._count(batch)
                    continue
            except Exception:  # the storage, most likely; it is asked again
                logger.exception("batches")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _POLL_SECONDS)
            self._woken.clear()

    def _count(self, batch: Batch) -> None:
        state = self._work.batches.state(batch)
        self._ended.inc(tags={"status": state.status})
        for outcome in ("completed", "failed"):
            if found := state.counts.get(outcome):
                self._answered.inc(found, tags={"outcome": outcome})

    def _started(self, batch: Batch) -> "RayJob":
        return RayJob(BatchJob(batch, self._place, self._limits, self._resolve))


class JobActor:
    """The process that drives one batch."""

    def run(self, job: BatchJob) -> None:
        """See ``BatchJob.run``."""
        job.run()


class RayJob:
    """A batch that an actor computes."""

    def __init__(self, job: BatchJob) -> None:
        self._actor = ray.remote(num_cpus=0, max_restarts=0)(JobActor).remote()
        self._done = asyncio.wrap_future(self._actor.run.remote(job).future())

    async def wait(self, seconds: float) -> bool:
        """See ``Job.wait``."""
        await asyncio.wait({self._done}, timeout=seconds)
        if not self._done.done():
            return False
        try:
            self._done.result()
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EmbedloomError):
                raise error.cause from error
            raise
        return True

    def kill(self) -> None:
        """See ``Job.kill``; harmless when it is over."""
        ray.kill(self._actor)
