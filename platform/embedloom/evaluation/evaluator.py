"""Scoring models on tasks in the connected Ray: survey the tasks, embed each text once, let mteb score, on a pool of actors."""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from embedloom.compute.shards import elsewhere, fetch_weights, no_place, reserved
from embedloom.config.cluster import PoolConfig
from embedloom.config.embedding import computed_dtype
from embedloom.core.artefacts import Artefact
from embedloom.core.progress import Progress, note
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.registry import fetched_by_name
from embedloom.encoder.tokenizer import CutTexts, unknown_warning
from embedloom.errors import StageError, last_line
from embedloom.evaluation.jobs import (
    EmbedJob,
    Job,
    Outcome,
    Part,
    ScoreJob,
    Scorer,
    ShardPlan,
    Survey,
    SurveyJob,
    TimeJob,
    Unit,
    VectorStore,
    plan_shards,
)
from embedloom.evaluation.results import (
    drop_other_prompts,
    finish_task,
    missing_parts,
    read_scores,
    save_outcome,
)
from embedloom.evaluation.scoring import EvaluationActor
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.tasks import check_rooms

# Scheduling jobs over a pool of Ray actors, each with one model warm.


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
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=self._pool.start_budget)
            if done:
                break
            if all(job is None for _, job in self._running.values()):
                raise no_place("evaluate", "no actor", self._pool, ray.cluster_resources())
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


Failures = dict[str, str]  # label -> reason


class Evaluator:
    """Keeps its actors warm from one call to the next; leaving its ``with`` block stops them."""

    def __init__(
        self,
        tasks: Sequence[TaskSpec],
        corpus: Artefact | None,
        pool: PoolConfig,
        place: Place,
        vectors: Place,
        dtype: DTypeName,
        shard_texts: int,
    ) -> None:
        """Start no actor yet.

        Args:
            tasks: what to score on.
            corpus: artefact whose held-out split ``heldout`` tasks use.
            pool: actors and what each reserves.
            place: where results go.
            vectors: where embedded texts are kept; may be shared between evaluations.
            dtype: compute type; auto is bfloat16 on GPUs, and on CPUs what each computes fast.
            shard_texts: texts that one actor embeds at a time.
        """
        self._tasks = list(tasks)
        self._pool_config = pool
        self._place = place.absolute()
        self._vectors = vectors.absolute()
        # Kept vectors are named by it: those of GPUs are not taken for a CPU's.
        self._dtype: DTypeName = computed_dtype(dtype, pool.gpus) if pool.gpus else dtype
        self._shard_texts = shard_texts
        # An actor may run in another folder, so relative places would point elsewhere there.
        readable = corpus and Artefact(corpus.place.absolute(), corpus.manifest)
        self._arguments = (readable, self._dtype, pool.compute_threads)
        self._pool: ScoringPool | None = None
        self._surveys: dict[TaskSpec, Survey] = {}
        self._keyed: set[str] = set()  # contracts whose texts are surveyed
        self._plans: dict[str, ShardPlan] = {}

    def __enter__(self) -> "Evaluator":
        """The evaluator itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the actors."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def score(self, units: Sequence[Unit], contracts: dict[str, PromptContract]) -> Failures:
        """Compute every unit that is not done; what fails is returned, everything else is stored.

        Args:
            units: whole tasks of scorers, in the order of the report.
            contracts: of the units' models, by hash.
        """
        for unit in units:
            drop_other_prompts(self._place, unit)
        todo = [unit for unit in units if not self._place.exists(unit.figures_path)]
        if not todo:
            return {}
        check_rooms(todo, contracts)
        if self._pool is None:  # its actors hold what the fetching tasks reserve
            folders = {unit.scorer.folder for unit in todo if unit.scorer.folder is not None}
            named = tuple(fetch for folder in folders for fetch in fetched_by_name(folder))
            fetch_weights("evaluate", elsewhere(named), self._pool_config)
        failures = self._survey(
            [contracts[key] for key in sorted({u.scorer.contract_hash for u in todo} - {""})]
        )
        jobs, done = self._jobs([unit for unit in todo if unit.task in self._surveys])
        progress = Progress("evaluate", len(jobs) + done, "steps", done=done)

        def save(job: Job, outcome: Outcome) -> None:
            values = {}
            if isinstance(job, ScoreJob) and job.unit is not None:
                survey = self._surveys[job.unit.task]
                save_outcome(self._place, job.unit, outcome, survey.subsets)
                values = self._finish(Unit(job.unit.scorer, job.unit.task))
            progress.advance(1, **values)

        if jobs:
            failed = self._started(len(jobs)).run(jobs, save)
            failures |= {job.label: reason for job, reason in failed.items() if isinstance(job, ScoreJob)}
        return failures

    def warm(self, scorer: Scorer) -> None:
        """Start all actors and have each load a model, before anybody looks at a clock."""
        label = f"{scorer.name}/warm"
        jobs = [TimeJob(label, scorer, (), ("a query",)) for _ in range(2 * self._pool_config.max_actors)]
        self._started(len(jobs)).run(jobs, lambda job, outcome: None)

    def time(self, scorers: Sequence[Scorer], queries: Sequence[str]) -> dict[str, dict[str, float]]:
        """Milliseconds of one query, by scorer: each model alone, one query at a time.

        Raises:
            StageError: a model could not be timed.
        """
        found: dict[str, dict[str, float]] = {}
        for scorer in scorers:
            job = TimeJob(f"{scorer.name}/latency", scorer, (), tuple(queries))
            failed = self._started(1).run(
                [job], lambda job, outcome: found.update({job.label: outcome.figures})
            )
            if failed:
                raise StageError(f"evaluate: {job.label} failed: {failed[job]}")
        return {scorer.name: found[f"{scorer.name}/latency"] for scorer in scorers}

    def survey(self, spec: TaskSpec) -> Survey:
        """What a task turned out to be; only after ``score``."""
        return self._surveys[spec]

    def _started(self, size: int) -> ScoringPool:
        if self._pool is None:
            self._pool = ScoringPool(EvaluationActor, self._arguments, self._pool_config, max(1, size))
        self._pool.grow(size)
        return self._pool

    def _survey(self, contracts: Sequence[PromptContract]) -> Failures:
        """Look at every task, also finished ones: who owns a text must not depend on what is finished."""
        new = tuple(contract for contract in contracts if contract.hash not in self._keyed)
        open_tasks = [task for task in self._tasks if new or task not in self._surveys]
        if not open_tasks:
            return {}
        note("evaluate", f"looking at {len(open_tasks)} tasks")
        jobs = {SurveyJob(task.name, None, (), task, new): task for task in open_tasks}

        def save(job: Job, outcome: Outcome) -> None:
            assert isinstance(job, SurveyJob) and outcome.survey is not None  # noqa: S101 - the only jobs here
            known = self._surveys.get(jobs[job])
            if known is not None:
                outcome.survey.keys.update(known.keys)
                outcome.survey.prompts.update(known.prompts)
            self._surveys[jobs[job]] = outcome.survey

        failed = self._started(len(jobs)).run(list(jobs), save)
        self._keyed |= {contract.hash for contract in new}
        for contract in new:
            keys = {
                (task, part): self._surveys[task].keys[contract.hash][part]
                for task in self._tasks
                if task in self._surveys
                for part in self._surveys[task].parts
            }
            self._plans[contract.hash] = plan_shards(keys, self._shard_texts)
        return {job.label: reason for job, reason in failed.items()}

    def _jobs(self, units: Sequence[Unit]) -> tuple[list[Job], int]:
        """Jobs for what is missing, models together and a task's texts before its scores; and the parts done."""
        jobs: list[Job] = []
        embedding: dict[tuple[str, str], EmbedJob | None] = {}  # None: the shard is there
        done = 0
        for unit in units:
            survey = self._surveys[unit.task]
            parts = missing_parts(self._place, unit, survey)
            done += len(survey.parts) - len(parts)
            if not parts:
                self._finish(unit)
            for part in parts:
                needs, shards, store = self._embedding_jobs(unit.scorer, (unit.task, part), embedding, jobs)
                scored = Unit(unit.scorer, unit.task, part)
                jobs.append(ScoreJob(scored.label, unit.scorer, needs, scored, shards, store))
        return jobs, done

    def _embedding_jobs(
        self, scorer: Scorer, part: Part, embedding: dict[tuple[str, str], EmbedJob | None], jobs: list[Job]
    ) -> tuple[tuple[Job, ...], tuple[str, ...], str]:
        if scorer.folder is None:
            return (), (), ""
        store = self._store(scorer)
        plan = self._plans[scorer.contract_hash]
        wanted = set(plan.needs[part])
        needs: list[Job] = []
        for shard in plan.shards:
            if shard.id not in wanted:
                continue
            key = (store.place.uri, shard.id)
            if key not in embedding:
                label = f"{scorer.name}/{shard.part[0].name}/texts {shard.id}"
                job = None if store.has(shard.id) else EmbedJob(label, scorer, (), shard, store.place.uri)
                embedding[key] = job
                if job is not None:
                    jobs.append(job)
            if (needed := embedding[key]) is not None:
                needs.append(needed)
        return tuple(needs), plan.needs[part], store.place.uri

    def _store(self, scorer: Scorer) -> VectorStore:
        return VectorStore(self._vectors.child(f"{scorer.revision}-{scorer.contract_hash}-{self._dtype}"))

    def _finish(self, unit: Unit) -> dict[str, float]:
        """Mark a task done if all its parts are; returns its score for the progress line."""
        survey = self._surveys[unit.task]
        if missing_parts(self._place, unit, survey):
            return {}
        tokens = padded = 0
        cuts = CutTexts()
        if unit.scorer.folder is not None:
            store = self._store(unit.scorer)
            for shard in self._plans[unit.scorer.contract_hash].shards:
                if shard.part[0] == unit.task and store.has(shard.id):
                    cost, cut = store.summary(shard.id)
                    tokens, padded = tokens + cost[0], padded + cost[1]
                    cuts.add(cut)
        finish_task(self._place, unit, survey, tokens, padded, cuts)
        if cuts.cut or unknown_warning(cuts.unknown, cuts.read):
            note("evaluate", f"{unit.label}: {cuts}")
        return {unit.label: read_scores(self._place, unit)["main_score"]}
