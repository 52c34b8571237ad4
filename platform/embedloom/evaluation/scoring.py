"""One actor's work: a model as mteb sees it, the texts it embeds, and the scores of every item, caught while mteb scores."""

import contextlib
import io
import json
import random
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pyarrow as pa
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from embedloom.core.artefacts import Artefact
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.backbone import DTypeName
from embedloom.encoder.model import DEFAULT_BATCH_TOKENS, Encoder, Vectors
from embedloom.encoder.pairs import PairEncoder
from embedloom.encoder.registry import local_folder, open_model
from embedloom.errors import StageError
from embedloom.evaluation.hybrid import HybridSearch
from embedloom.evaluation.jobs import (
    EmbedJob,
    Job,
    Outcome,
    ScoreJob,
    Scorer,
    Survey,
    SurveyJob,
    TimeJob,
    VectorStore,
    VectorTable,
    text_keys,
)
from embedloom.evaluation.reranked_search import RerankedSearch
from embedloom.evaluation.retrieval_task import INSTRUCTION_COLUMN
from embedloom.evaluation.scorers import load_bm25
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.statistics import Statistic
from embedloom.evaluation.tasks import build_task, task_size
from embedloom.evaluation.texts import Role, TextList, list_texts, role_of, scoring_subsets, sent_prompts
from embedloom.retrieval.teachers import SentenceEncoder

# What every query, text or pair of a task contributed to its score, caught while mteb scores it.
#
# Paired tests need more than one number a task. A table row is one item: ``value`` is what the model got for it and
# ``target``, for statistics that are no mean, what it should have got.


SCHEMA = pa.schema(
    [("split", pa.string()), ("subset", pa.string()), ("item", pa.string()), ("statistic", pa.string()),
     ("value", pa.float64()), ("target", pa.float64())]
)  # fmt: skip
# Metrics that are means over queries: mteb's key -> trec_eval's.
_PER_QUERY = {"ndcg_at_": "ndcg_cut_", "map_at_": "map_cut_", "recall_at_": "recall_", "precision_at_": "P_"}


@dataclass(slots=True)
class ItemLog:
    """Rows of ``SCHEMA``, growing while mteb runs."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, split: str, subset: str, statistic: Statistic, values: dict[str, float], targets: Any = None
    ) -> None:
        """Append one item for every value."""
        right = [None] * len(values) if targets is None else [float(target) for target in targets]
        self.rows += [
            {
                "split": split,
                "subset": subset,
                "item": item,
                "statistic": statistic,
                "value": float(value),
                "target": target,
            }
            for (item, value), target in zip(values.items(), right, strict=True)
        ]

    def table(self) -> pa.Table:
        """All rows."""
        return pa.Table.from_pylist(self.rows, schema=SCHEMA)


@contextmanager
def watched(task: AbsTask) -> Iterator[ItemLog]:
    """Catch the items of everything mteb scores on ``task`` inside the block.

    mteb hands per-query scores to ``task_specific_scores`` and predictions to the hook that would write them to a
    file; both are methods of the task, and the instance's own attribute shadows them for the while.
    """
    log = ItemLog()
    specific = getattr(task, "task_specific_scores", None)

    def per_query(scores: Any, *arguments: Any, hf_split: str, hf_subset: str) -> Any:
        metric = _query_metric(task.metadata.main_score)
        if metric is not None:
            log.add(hf_split, hf_subset, "mean", {query: found[metric] for query, found in scores.items()})
        return specific(scores, *arguments, hf_split=hf_split, hf_subset=hf_subset) if specific else {}

    def predicted(predictions: Any, model: Any, folder: Any, hf_split: str, hf_subset: str) -> None:
        _log_predictions(log, task, predictions, hf_split, hf_subset)

    hooks: dict[str, Callable[..., Any]] = {"_save_task_predictions": predicted}
    if isinstance(task, AbsTaskRetrieval):
        hooks["task_specific_scores"] = per_query
    for name, hook in hooks.items():
        setattr(task, name, hook)
    try:
        yield log
    finally:
        for name in hooks:
            delattr(task, name)


def log_clustering(log: ItemLog, split: str, scores: dict[str, Any]) -> None:
    """Clustering has no score of a single text: its items are the v-measures of mteb's repeated samples."""
    levels = scores.get("v_measures")
    if isinstance(levels, dict):
        values = {f"{level} {n}": value for level, found in levels.items() for n, value in enumerate(found)}
        log.add(split, scores["hf_subset"], "mean", values)


def _query_metric(main_score: str) -> str | None:
    for ours, theirs in _PER_QUERY.items():
        if main_score.startswith(ours):
            return theirs + main_score.removeprefix(ours)
    return None


def _log_predictions(log: ItemLog, task: AbsTask, predictions: Any, split: str, subset: str) -> None:
    data = (task.dataset or {}).get(subset, task.dataset)
    if isinstance(task, AbsTaskClassification) and task.metadata.type == "Classification":
        labels = np.asarray(data[split][task.label_column_name])
        if all(len(run) == len(labels) for run in predictions):
            log.add(split, subset, "mean", _numbered((np.asarray(predictions) == labels).mean(axis=0)))
    elif isinstance(task, AbsTaskSTS):
        log.add(split, subset, "spearman", _numbered(predictions["cosine_scores"]), data[split]["score"])
    elif isinstance(task, AbsTaskPairClassification):
        rows = data[split][0] if len(data[split]) == 1 else data[split]
        scores = _numbered(predictions["similarity_scores"])
        log.add(split, subset, "average_precision", scores, rows[task.label_column_name])
    elif isinstance(task, AbsTaskBitextMining) and list(predictions) == ["sentence1-sentence2"]:
        gold = data[split].get("gold") if isinstance(data[split], dict) else None  # mteb's BUCC alone has one
        found = predictions["sentence1-sentence2"]
        right = {
            str(n): float(match["corpus_id"] == (n if gold is None else gold[n][1]))
            for n, match in enumerate(found)
        }
        log.add(split, subset, "mean", right)


def _numbered(values: Any) -> dict[str, float]:
    return {str(number): float(value) for number, value in enumerate(values)}


# Our encoder as mteb sees one: each text goes through the model's prompt contract, by task type and side.


class EncoderModel(AbsEncoder):
    """mteb's encoder protocol around an ``Encoder``; takes vectors from ``known`` where they are there."""

    def __init__(
        self,
        encoder: Encoder | SentenceEncoder,
        name: str,
        revision: str,
        max_batch_tokens: int | None = DEFAULT_BATCH_TOKENS,
    ) -> None:
        self.encoder = encoder
        self.max_batch_tokens = max_batch_tokens
        self.known: VectorTable | None = None
        self.instructed = True  # whether texts get the benchmark's instructions, see ``role_of``
        self.mteb_model_meta = model_meta(encoder, name, revision)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Vectors of all texts of a data loader: float32 [texts, dimension].

        Args:
            inputs: batches with a ``text`` list each.
            task_metadata: decides the task type and, with ``prompt_type``, the instruction.
            hf_split: unused.
            hf_subset: unused.
            prompt_type: query or document; None where both texts play the same part.
            kwargs: mteb's encode arguments; batches follow our token budget instead.
        """
        texts: list[str] = []
        own: list[str | None] = []
        for batch in inputs:
            texts.extend(batch["text"])
            if self.instructed:
                own.extend(instruction or None for instruction in batch.get(INSTRUCTION_COLUMN, ()))
        role = role_of(task_metadata, prompt_type, self.encoder.contract, self.instructed)
        if self.known is None:
            return self._embed(texts, role, own or role.instruction)
        return self._embed_unknown(texts, role, own or [role.instruction] * len(texts), self.known)

    def _embed(self, texts: list[str], role: Role, instruction: Any) -> Vectors:
        return self.encoder.embed(texts, role.side, role.task_type, instruction, self.max_batch_tokens)

    def _embed_unknown(
        self, texts: list[str], role: Role, instructions: list[str | None], known: VectorTable
    ) -> Vectors:
        """Vectors from ``known``; the rest is embedded, each distinct text once, and not kept."""
        keys = text_keys(self.encoder.contract, role.task_type, texts, [role.side] * len(texts), instructions)
        found, vectors = known.look_up(keys)
        if found.all():
            return vectors
        missing = np.flatnonzero(~found)
        _, first, number = np.unique(keys[missing], axis=0, return_index=True, return_inverse=True)
        chosen = missing[np.sort(first)]
        place = np.argsort(np.argsort(first))  # unique sorts by key; the texts stay in mteb's order
        fresh = self._embed([texts[i] for i in chosen], role, [instructions[i] for i in chosen])
        result: Vectors = np.empty((len(texts), self.encoder.dimension), dtype=np.float32)
        result[found] = vectors
        result[missing] = fresh[place[number.reshape(-1)]]
        return result


def model_meta(encoder: Encoder | SentenceEncoder, name: str, revision: str) -> ModelMeta:
    """What mteb stores beside the results (``model_meta.json``).

    Args:
        encoder: the loaded model.
        name: ``organisation/model``; mteb makes the result folder from it.
        revision: identity of the weights.
    """
    contract = encoder.contract
    return ModelMeta.create_empty(
        {
            "name": name,
            "revision": revision,
            "n_parameters": sum(parameter.numel() for parameter in encoder.backbone.parameters()),
            "max_tokens": max(contract.max_query_tokens, contract.max_document_tokens),
            "embed_dim": encoder.dimension,
            "framework": ["PyTorch", "Sentence Transformers", "safetensors"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": "{task}" in contract.template,
        }
    )


# One actor's work: holding a model, embedding shards of texts with it and letting mteb score tasks.


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
            encoder = self._encoder(job.scorer)
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
                    vectors[rows] = encoder.embed(texts, side, listed.task_type, instructions)
            tokens = (encoder.tokens.real - before[0], encoder.tokens.padded - before[1])
            store.write(job.shard.id, listed.keys[job.shard.rows], vectors, *tokens, encoder.cuts.take())
        return Outcome()

    def _score(self, job: ScoreJob) -> Outcome:
        assert job.unit is not None  # noqa: S101 - dataclass default
        started = time.monotonic()
        task = self._task(job.unit.task)
        model = self._load(job.unit.scorer)
        before, embedding = _token_counts(model), _embedding_of(model)
        if embedding is not None:
            embedding.known = VectorStore(Place(job.store)).read(job.shards) if job.store else None
            embedding.instructed = job.unit.task.instructed
        try:
            searched = HybridSearch(model) if job.unit.scorer.fused else model
            files, items = score_subset(searched, task, job.unit.subset)
        finally:
            if embedding is not None:
                embedding.known = None
        figures = {key: value - before[key] for key, value in _token_counts(model).items()}
        figures |= task_size(task, job.unit.subset)
        return Outcome(files, {**figures, "seconds": round(time.monotonic() - started, 3)}, items)

    def _time(self, job: TimeJob) -> Outcome:
        assert job.scorer is not None  # noqa: S101 - dataclass default
        encoder = self._encoder(job.scorer)
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

    def _encoder(self, scorer: Scorer) -> Encoder | SentenceEncoder:
        embedding = _embedding_of(self._load(scorer))
        assert embedding is not None  # noqa: S101 - no job asks BM25 for vectors
        return embedding.encoder

    def _load(self, scorer: Scorer) -> Any:
        if scorer == self._scorer:
            return self._model
        self._scorer = self._model = None  # frees the last model before the next one takes its memory
        if scorer.folder is None:
            self._model = load_bm25()
        else:
            encoder: Encoder | SentenceEncoder
            folder = local_folder(scorer.folder)
            if open_model(folder).beyond is not None:
                encoder = SentenceEncoder(folder, self._dtype, self._threads)
            else:
                encoder = Encoder.load(folder, threads=self._threads, dtype=self._dtype)
            self._model = EncoderModel(encoder, scorer.mteb_name, scorer.revision)
        if scorer.reranker is not None:
            reranker = PairEncoder.open(scorer.reranker, threads=self._threads, dtype=self._dtype)
            self._model = RerankedSearch(self._model, reranker, scorer.top)
        self._scorer = scorer
        return self._model


def _embed_probe(encoder: Encoder | SentenceEncoder, query: str) -> None:
    """Embed a query for the time it takes, whatever the limit leaves of it."""
    if isinstance(encoder, Encoder):
        encoder.embed_tokens([encoder.tokenize_probe(query, "query")])
    else:
        encoder.embed([query], "query")


def _embedding_of(model: Any) -> EncoderModel | None:
    """The embedding model that an actor holds, alone or before a reranker."""
    model = model.model if isinstance(model, RerankedSearch) else model
    return model if isinstance(model, EncoderModel) else None


def _token_counts(model: Any) -> dict[str, int]:
    """What a model has computed so far."""
    found = {"tokens": 0, "padded_tokens": 0}
    counted = [embedding.encoder.tokens] if (embedding := _embedding_of(model)) is not None else []
    if isinstance(model, RerankedSearch):
        counted.append(model.reranker.tokens)
        found |= {"pairs": model.pairs, "pairs_cut": model.reranker.cuts.cut}
    for tokens in counted:
        found["tokens"] += tokens.real
        found["padded_tokens"] += tokens.padded
    return found


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
