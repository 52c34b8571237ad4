"""Main scores and per-item scores of one model folder after another, for merge searches on development tasks."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from embedloom.artefacts import Artefact
from embedloom.config.resources import PoolConfig
from embedloom.config.use import EvaluationTask
from embedloom.encoder.device import DTypeName
from embedloom.errors import StageError
from embedloom.evaluation.evaluator import Evaluator
from embedloom.evaluation.jobs import Unit
from embedloom.evaluation.results import read_scores
from embedloom.evaluation.scorers import make_scorers
from embedloom.evaluation.specs import expand_tasks
from embedloom.evaluation.standings import read_strata
from embedloom.evaluation.tasks import check_task
from embedloom.storage import Place

_SHARD_TEXTS = 4096


class DevScorer:
    """Scores model folders on the same tasks; actors stay warm from one to the next."""

    def __init__(
        self,
        tasks: Sequence[EvaluationTask],
        corpus: Artefact | None,
        pool: PoolConfig,
        place: Place,
        dtype: DTypeName,
    ) -> None:
        """Check the tasks; start nothing.

        Args:
            tasks: what to score on.
            corpus: of the run, for ``heldout`` tasks.
            pool: actors and what each reserves.
            place: scratch folder of results and vectors; a folder scored before is read back from it.
            dtype: compute type.

        Raises:
            UserError: a task that cannot be scored.
        """
        self._tasks = expand_tasks(tasks)
        for task in self._tasks:
            check_task(task, corpus)
        self._place = place
        self._evaluator = Evaluator(
            self._tasks, corpus, pool, place, place.child("vectors"), dtype, _SHARD_TEXTS
        )

    def __enter__(self) -> "DevScorer":
        """The scorer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the actors."""
        self._evaluator.__exit__(kind, error, trace)

    def __call__(self, name: str, folder: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Score one model folder.

        Args:
            name: of the model, in progress lines; results are kept under the folder's fingerprint.
            folder: a model folder.

        Returns:
            Main score by task, and by task the value of each item (``split/subset/item``); a task whose score is no
            mean of items (STS, pair classification) has none.

        Raises:
            StageError: a task could not be scored.
        """
        (scorer,), contracts = make_scorers({name: folder}, (), None)
        named = scorer.under(f"{name}-{scorer.revision}")
        units = [Unit(named, task) for task in self._tasks]
        failures = self._evaluator.score(units, contracts)
        if failures:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
            raise StageError(f"{name}: could not be scored: {reasons}")
        scores = {unit.task.name: read_scores(self._place, unit)["main_score"] for unit in units}
        items = {
            unit.task.name: {
                f"{stratum.key}/{item}": float(value)
                for stratum in read_strata(self._place, unit)
                if stratum.targets is None
                for item, value in zip(stratum.items, stratum.values, strict=True)
            }
            for unit in units
        }
        return scores, items
