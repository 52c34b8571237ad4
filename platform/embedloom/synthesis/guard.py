"""The index of evaluation texts that rows are held against: built once per artefact, in a task."""

from embedloom.config.quality import ContaminationCheck
from embedloom.engines.tasks import run_tasks
from embedloom.storage import Place
from embedloom.synthesis.quality.contamination import build_index, evaluation_texts, save_index

_FILE = "steps/guard.npz"


def guard_file(
    stage: str, check: ContaminationCheck | None, corpus: Place, place: Place
) -> tuple[Place, str] | None:
    """Where the index lies, built if it is not there yet; None without the check.

    Raises:
        DataError: evaluation texts that are not there or not readable.
    """
    if check is None:
        return None
    if not place.exists(_FILE):
        list(run_tasks(stage, _build, [check], corpus, place, cpus=1.0))
    return place, _FILE


def _build(check: ContaminationCheck, corpus: Place, place: Place) -> None:
    save_index(place, _FILE, build_index(evaluation_texts(check, corpus)))
