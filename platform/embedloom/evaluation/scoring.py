"""One actor's work: holding a model, embedding shards of texts with it and letting mteb score tasks."""

import contextlib
import io
import json
import random
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.cache import ResultCache

from embedloom.artefacts import Artefact
from embedloom.encoder.device import DTypeName
from embedloom.encoder.model import DEFAULT_BATCH_TOKENS, Encoder
from embedloom.encoder.registry import open_model
from embedloom.errors import StageError
from embedloom.evaluation.bm25 import load_bm25
from embedloom.evaluation.items import ItemLog, log_clustering, watched
from embedloom.evaluation.jobs import EmbedJob, Job, Outcome, ScoreJob, Scorer, Survey, SurveyJob, TimeJob
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.tasks import build_task, task_size
from embedloom.evaluation.texts import TextList, list_texts, scoring_subsets, sent_prompts
from embedloom.evaluation.vector_store import VectorStore
from embedloom.evaluation.wrapper import EncoderModel
from embedloom.instructions import PromptContract
from embedloom.retrieval.sentence_teacher import SentenceEncoder
from embedloom.storage import Place

_LOADER_ROWS = 256  # texts per step of mteb's data loader; our batches follow the token budget
_KEPT_TASKS = 16
_KEPT_LISTS = 8


class EvaluationActor:
    """Holds the last model and the tasks it saw last."""

    def __init__(self, corpus: Artefact | None, dtype: DTypeName, threads: int) -> None:
        datasets.disable_progress_bars()
        self._corpus = corpus
        self._dtype: DTypeName = dtype
        self._threads = threads
        self._scorer: Scorer | None = None
        self._model: Any = None
        self._tasks: OrderedDict[TaskSpec, AbsTask] = OrderedDict()
        self._lists: OrderedDict[tuple[TaskSpec, str | None, str], TextList] = OrderedDict()

    def ready(self) -> None:
        """Return once the actor runs."""

    def work(self, job: Job) -> Outcome:
        """Do one job."""
        if isinstance(job, SurveyJob) and job.task is not None:
            return self._survey(job.task, job.contracts)
        if isinstance(job, EmbedJob):
            return self._embed(job)
        if isinstance(job, ScoreJob):
            return self._score(job)
        if isinstance(job, TimeJob):
            return self._time(job)
        raise StageError(f"evaluate: {job.label} is no job of this actor")

    def _survey(self, spec: TaskSpec, contracts: Sequence[PromptContract]) -> Outcome:
        task = self._task(spec)
        parts = scoring_subsets(task)
        keys = {
            contract.hash: {part: self._texts(spec, part, contract).keys for part in parts}
            for contract in contracts
        }
        prompts = {c.hash: sent_prompts(task, c, spec.instructed) for c in contracts}
        metadata = task.metadata
        return Outcome(
            survey=Survey(
                type=metadata.type,
                metric=metadata.main_score,
                revision=metadata.revision,
                splits=tuple(task.eval_splits),
                subsets=tuple(task.hf_subsets),
                parts=tuple(parts),
                ranks_documents=isinstance(task, AbsTaskRetrieval),
                keys=keys,
                prompts=prompts,
            )
        )

    def _embed(self, job: EmbedJob) -> Outcome:
        assert job.shard is not None and job.scorer is not None  # noqa: S101 - dataclass defaults
        store = VectorStore(Place(job.store))
        if not store.has(job.shard.id):
            encoder = self._load(job.scorer).encoder
            listed = self._texts(*job.shard.part, encoder.contract)
            chosen = [listed.entries[row] for row in job.shard.rows]
            vectors = np.empty((len(chosen), encoder.dimension), dtype=np.float32)
            before = (encoder.tokens.real, encoder.tokens.padded)
            encoder.cuts.take()
            for side in ("query", "document"):
                rows = [number for number, entry in enumerate(chosen) if entry.side == side]
                texts = [chosen[row].text for row in rows]
                instructions = [chosen[row].instruction for row in rows]
                if rows:
                    vectors[rows] = encoder.embed(
                        texts, side, listed.task_type, instructions, DEFAULT_BATCH_TOKENS
                    )
            tokens = (encoder.tokens.real - before[0], encoder.tokens.padded - before[1])
            store.write(job.shard.id, listed.keys[job.shard.rows], vectors, *tokens, encoder.cuts.take())
        return Outcome()

    def _score(self, job: ScoreJob) -> Outcome:
        assert job.unit is not None  # noqa: S101 - dataclass default
        started = time.monotonic()
        task = self._task(job.unit.task)
        model = self._load(job.unit.scorer)
        before = _token_counts(model)
        if isinstance(model, EncoderModel):
            model.known = VectorStore(Place(job.store)).read(job.shards) if job.store else None
            model.instructed = job.unit.task.instructed
        try:
            files, items = score_subset(model, task, job.unit.subset)
        finally:
            if isinstance(model, EncoderModel):
                model.known = None
        figures = {key: value - before[key] for key, value in _token_counts(model).items()}
        figures |= task_size(task, job.unit.subset)
        return Outcome(files, {**figures, "seconds": round(time.monotonic() - started, 3)}, items)

    def _time(self, job: TimeJob) -> Outcome:
        assert job.scorer is not None  # noqa: S101 - dataclass default
        encoder = self._load(job.scorer).encoder
        for query in job.queries[:4]:  # first calls choose kernels and fill caches
            _embed_probe(encoder, query)
        seconds = []
        for query in job.queries:
            started = time.perf_counter()
            _embed_probe(encoder, query)
            seconds.append(time.perf_counter() - started)
        milliseconds = np.asarray(seconds) * 1000
        return Outcome(
            figures={
                "p50_milliseconds": round(float(np.median(milliseconds)), 3),
                "p95_milliseconds": round(float(np.quantile(milliseconds, 0.95)), 3),
                "queries": len(seconds),
            }
        )

    def _task(self, spec: TaskSpec) -> AbsTask:
        if spec not in self._tasks:
            self._tasks[spec] = build_task(spec, self._corpus)
            if len(self._tasks) > _KEPT_TASKS:
                self._tasks.popitem(last=False)
        self._tasks.move_to_end(spec)
        return self._tasks[spec]

    def _texts(self, spec: TaskSpec, part: str | None, contract: PromptContract) -> TextList:
        key = (spec, part, contract.hash)
        if key not in self._lists:
            self._lists[key] = list_texts(self._task(spec), part, contract, spec.instructed)
            if len(self._lists) > _KEPT_LISTS:
                self._lists.popitem(last=False)
        return self._lists[key]

    def _load(self, scorer: Scorer) -> Any:
        if scorer == self._scorer:
            return self._model
        self._scorer = self._model = None  # frees the last model before the next one takes its memory
        if scorer.folder is None:
            self._model = load_bm25()
        else:
            encoder: Encoder | SentenceEncoder
            if open_model(scorer.folder).beyond is not None:
                encoder = SentenceEncoder(scorer.folder, self._dtype, self._threads)
            else:
                encoder = Encoder.load(scorer.folder, threads=self._threads, dtype=self._dtype)
            self._model = EncoderModel(encoder, scorer.mteb_name, scorer.revision)
        self._scorer = scorer
        return self._model


def _embed_probe(encoder: Encoder | SentenceEncoder, query: str) -> None:
    """Embed a query for the time it takes, whatever the limit leaves of it."""
    if isinstance(encoder, Encoder):
        encoder.embed_tokens([encoder.tokenize_probe(query, "query")])
    else:
        encoder.embed([query], "query")


def _token_counts(model: Any) -> dict[str, int]:
    if not isinstance(model, EncoderModel):
        return {"tokens": 0, "padded_tokens": 0}
    return {"tokens": model.encoder.tokens.real, "padded_tokens": model.encoder.tokens.padded}


def score_subset(model: Any, task: AbsTask, subset: str | None = None) -> tuple[dict[str, bytes], Any]:
    """Let mteb score one subset, or the whole task; returns its files and the items (a pyarrow table).

    mteb draws from generators that live in the task: they start afresh here, so that a score depends neither on what
    the task was used for before nor on which model came first.
    """
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)
    subsets = task.hf_subsets
    task.hf_subsets = subsets if subset is None else [subset]
    try:
        with watched(task) as log:
            files = run_mteb(model, task, predictions=True)
    finally:
        task.hf_subsets = subsets
    _add_clustering(log, task, files)
    return files, log.table()


def _add_clustering(log: ItemLog, task: AbsTask, files: dict[str, bytes]) -> None:
    if task.metadata.type == "Clustering":
        for split, entries in json.loads(files[f"{task.metadata.name}.json"])["scores"].items():
            for entry in entries:
                log_clustering(log, split, entry)


def run_mteb(model: Any, task: AbsTask, predictions: bool = False) -> dict[str, bytes]:
    """Let mteb score ``task`` and return the files it would have stored for this model, by name.

    Args:
        model: anything mteb takes.
        task: loaded.
        predictions: whether mteb hands out its predictions too.
    """
    with tempfile.TemporaryDirectory(prefix="embedloom-") as scratch:
        # mteb's BM25 draws progress bars that no argument turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            mteb.evaluate(
                model,
                task,
                cache=ResultCache(scratch),
                co2_tracker=False,
                show_progress_bar=False,
                prediction_folder=Path(scratch, "predictions") if predictions else None,
                encode_kwargs={"batch_size": _LOADER_ROWS, "show_progress_bar": False},
            )
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(scratch, "results").rglob("*"))
            if path.is_file()
        }
