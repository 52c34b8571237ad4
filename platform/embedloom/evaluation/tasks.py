"""From a task of the config to an mteb task."""

import warnings
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks import AbsTask, AbsTaskRetrieval

from embedloom.artefacts import Artefact
from embedloom.config.use import EvaluationTask
from embedloom.errors import DataError
from embedloom.evaluation.beir import check_beir, read_beir
from embedloom.evaluation.heldout import check_heldout, read_heldout
from embedloom.evaluation.retrieval_task import make_retrieval_task


def check_task(task: EvaluationTask, corpus: Artefact) -> bool:
    """Fail early, reading no data, if a task cannot be built.

    Returns:
        Whether it ranks documents, so that BM25 can take part.

    Raises:
        DataError: missing files or pairs, an unknown mteb task, or one that is not about text.
    """
    where = _where(task)
    if task.kind == "heldout":
        check_heldout(corpus, task.split, where)
        return True
    if task.kind == "beir":
        check_beir(_folder(task), task.split, where)
        return True
    return isinstance(_mteb_task(task), AbsTaskRetrieval)


def build_task(task: EvaluationTask, corpus: Artefact) -> AbsTask:
    """The mteb task of a config entry, with its data loaded.

    Raises:
        DataError: the data is missing, malformed or, for an mteb task, neither cached nor reachable.
    """
    where = _where(task)
    if task.kind == "heldout":
        return make_retrieval_task(
            task.name, task.split, read_heldout(corpus, task.split, where).limited(task.limit)
        )
    if task.kind == "beir":
        return make_retrieval_task(
            task.name, task.split, read_beir(_folder(task), task.split, where).limited(task.limit)
        )
    return _loaded(_mteb_task(task), where)


def task_size(task: AbsTask) -> dict[str, int]:
    """``{"queries": …, "documents": …}`` of a loaded retrieval task, ``{"queries": texts}`` of any other."""
    splits = [
        split
        for subset in _subsets(task)
        for name, split in subset.items()
        if name in task.metadata.eval_splits
    ]
    if isinstance(task, AbsTaskRetrieval):
        return {
            "queries": sum(len(split["queries"]) for split in splits),
            "documents": sum(len(split["corpus"]) for split in splits),
        }
    return {"queries": sum(len(split) for split in splits)}


def _subsets(task: AbsTask) -> list[Any]:
    """Mappings from split to data, one a language subset; aggregated tasks hold none themselves."""
    dataset = task.dataset or {}
    return [dataset[name] for name in task.hf_subsets if name in dataset] or [dataset]


def _mteb_task(task: EvaluationTask) -> AbsTask:
    where = _where(task)
    if task.limit is not None:
        raise DataError(
            f"{where}: limit is {task.limit}; an mteb task takes none, "
            "because its scores would not compare with anybody's"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mteb's advice on newer versions of a task; the user named this one
        try:
            found = mteb.get_task(task.name)
        except KeyError as error:
            hint = str(error.args[0]).removeprefix("KeyError: ")
            raise DataError(f"{where}: no mteb task has this name ({hint})") from error
    if found.metadata.modalities != ["text"]:
        raise DataError(f"{where}: is about {', '.join(found.metadata.modalities)}; allowed: text only")
    return found


def _loaded(task: AbsTask, where: str) -> AbsTask:
    if hasattr(task.metadata, "tasks"):  # an aggregate: mteb loads its parts one by one
        return task
    try:
        task.load_data()
        if isinstance(task, AbsTaskRetrieval):
            task.convert_v1_dataset_format_to_v2(num_proc=None)
    except Exception as error:  # the hub and dataset clients raise a dozen unrelated types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{where}: the dataset {task.metadata.dataset['path']!r} is neither cached nor reachable "
            f"({type(error).__name__}: {reason[0][:200]}); run once with network access, or use kind beir"
        ) from error
    return task


def _folder(task: EvaluationTask) -> Path:
    return Path(str(task.path)).expanduser()


def _where(task: EvaluationTask) -> str:
    return f"evaluation.tasks: {task.name!r}"
