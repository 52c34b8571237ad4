"""Scoring models on tasks in the connected Ray: survey the tasks, embed each text once, let mteb score."""

from collections.abc import Sequence
from types import TracebackType

from embedloom.artefacts import Artefact
from embedloom.config.resources import PoolConfig
from embedloom.encoder.device import DTypeName
from embedloom.encoder.tokenizer import CutTexts
from embedloom.errors import StageError
from embedloom.evaluation.jobs import (
    EmbedJob,
    Job,
    Outcome,
    ScoreJob,
    Scorer,
    Survey,
    SurveyJob,
    TimeJob,
    Unit,
)
from embedloom.evaluation.pool import ScoringPool
from embedloom.evaluation.results import (
    drop_other_prompts,
    finish_task,
    missing_parts,
    read_scores,
    save_outcome,
)
from embedloom.evaluation.scoring import EvaluationActor
from embedloom.evaluation.shard_plan import Part, ShardPlan, plan_shards
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.tasks import check_rooms
from embedloom.evaluation.vector_store import VectorStore
from embedloom.instructions import PromptContract
from embedloom.progress import Progress, note
from embedloom.storage import Place

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
            dtype: compute type.
            shard_texts: texts that one actor embeds at a time.
        """
        self._tasks = list(tasks)
        self._pool_config = pool
        self._place = place.absolute()
        self._vectors = vectors.absolute()
        self._dtype: DTypeName = dtype
        self._shard_texts = shard_texts
        # An actor may run in another folder, so relative places would point elsewhere there.
        readable = corpus and Artefact(corpus.place.absolute(), corpus.manifest)
        self._arguments = (readable, dtype, pool.compute_threads)
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
                    cost = store.cost(shard.id)
                    tokens, padded = tokens + cost[0], padded + cost[1]
                    cuts.add(store.cuts(shard.id))
        finish_task(self._place, unit, survey, tokens, padded, cuts)
        if cuts.cut:
            note("evaluate", f"{unit.label}: {cuts}")
        return {unit.label: read_scores(self._place, unit)["main_score"]}
