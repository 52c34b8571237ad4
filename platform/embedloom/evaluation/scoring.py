"""One actor's work: holding a model and letting mteb score tasks with it."""

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import mteb
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache

from embedloom.artefacts import Artefact
from embedloom.encoder.device import DTypeName
from embedloom.encoder.model import Encoder
from embedloom.evaluation.bm25 import load_bm25
from embedloom.evaluation.results import Outcome, Scorer, Unit
from embedloom.evaluation.tasks import build_task, task_size
from embedloom.evaluation.wrapper import EncoderModel

_LOADER_ROWS = 256  # texts per step of mteb's data loader; our batches follow the token budget


class EvaluationActor:
    """Holds the last model and every task it has seen."""

    def __init__(self, corpus: Artefact, dtype: DTypeName, threads: int) -> None:
        datasets.disable_progress_bars()
        self._corpus = corpus
        self._dtype: DTypeName = dtype
        self._threads = threads
        self._scorer: Scorer | None = None
        self._model: Any = None
        self._tasks: dict[str, AbsTask] = {}

    def ready(self) -> None:
        """Return once the actor runs."""

    def score(self, unit: Unit) -> Outcome:
        """Compute one result with mteb."""
        started = time.monotonic()
        if unit.task.name not in self._tasks:
            self._tasks[unit.task.name] = build_task(unit.task, self._corpus)
        task = self._tasks[unit.task.name]
        self._load(unit.scorer)
        tokens = self._token_counts()
        files = run_mteb(self._model, task)
        figures = {key: value - tokens[key] for key, value in self._token_counts().items()}
        figures |= task_size(task)
        return Outcome(files, {**figures, "type": task.metadata.type, "metric": task.metadata.main_score,
                               "seconds": round(time.monotonic() - started, 3)})  # fmt: skip

    def _load(self, scorer: Scorer) -> None:
        if scorer == self._scorer:
            return
        self._scorer = self._model = None  # frees the last model before the next one takes its memory
        if scorer.folder is None:
            self._model = load_bm25()
        else:
            encoder = Encoder.load(scorer.folder, threads=self._threads, dtype=self._dtype)
            self._model = EncoderModel(encoder, scorer.mteb_name, scorer.revision)
        self._scorer = scorer

    def _token_counts(self) -> dict[str, int]:
        if not isinstance(self._model, EncoderModel):
            return {"tokens": 0, "padded_tokens": 0}
        count = self._model.encoder.tokens
        return {"tokens": count.real, "padded_tokens": count.padded}


def run_mteb(model: Any, task: AbsTask) -> dict[str, bytes]:
    """Let mteb score ``task`` and return the files it would have stored for this model, by name."""
    with tempfile.TemporaryDirectory(prefix="embedloom-") as scratch:
        # mteb's BM25 draws progress bars that no argument turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            mteb.evaluate(
                model,
                task,
                cache=ResultCache(scratch),
                co2_tracker=False,
                show_progress_bar=False,
                encode_kwargs={"batch_size": _LOADER_ROWS, "show_progress_bar": False},
            )
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(scratch, "results").rglob("*"))
            if path.is_file()
        }
