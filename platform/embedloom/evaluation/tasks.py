"""From a task of the config to an mteb task."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.types import PromptType

from embedloom.core.artefacts import Artefact
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import located
from embedloom.encoder.registry import NodeModel, open_model
from embedloom.encoder.tokenizer import InstructionTooLong, check_room, load_tokenizer
from embedloom.errors import DataError, first_line
from embedloom.evaluation.jobs import Unit
from embedloom.evaluation.local_layout import RANKED_TYPES, check_beir, check_local_split
from embedloom.evaluation.local_tasks import make_labelled_task, make_ranked_task
from embedloom.evaluation.retrieval_task import check_heldout, make_retrieval_task, read_beir, read_heldout
from embedloom.evaluation.specs import TaskSpec
from embedloom.evaluation.texts import role_of


def check_task(spec: TaskSpec, corpus: Artefact | None) -> bool:
    """Fail early, reading no texts, if a task cannot be built.

    Returns:
        Whether it ranks documents, so that BM25 can take part.

    Raises:
        DataError: missing files or pairs, an unknown mteb task, or one that is not about text.
    """
    if spec.kind == "heldout":
        check_heldout(_given(corpus, spec), spec.split, spec.where)
        return True
    if spec.kind == "beir":
        check_beir(_folder(spec), spec.split, spec.where)
        return True
    if spec.local is not None:
        check_local_split(spec.local, spec.split, spec.where)
        return spec.local.type in RANKED_TYPES
    return isinstance(_mteb_task(spec), AbsTaskRetrieval)


def build_task(spec: TaskSpec, corpus: Artefact | None) -> AbsTask:
    """The mteb task of a config entry, with its data loaded.

    Raises:
        DataError: the data is missing, malformed or, for an mteb task, neither cached nor reachable.
    """
    if spec.kind == "heldout":
        data = read_heldout(_given(corpus, spec), spec.split, spec.where, spec.prompts == "own")
        return make_retrieval_task(spec.name, spec.split, data.limited(spec.limit))
    if spec.kind == "beir":
        data = read_beir(_folder(spec), spec.split, spec.where).limited(spec.limit)
        return make_retrieval_task(
            spec.name, spec.split, data, ignore_identical_ids=spec.ignore_identical_ids
        )
    if spec.local is not None:
        ranked = spec.local.type in RANKED_TYPES
        return (make_ranked_task if ranked else make_labelled_task)(spec, spec.local)
    return _loaded(_mteb_task(spec), spec.where)


def check_rooms(units: Sequence[Unit], contracts: Mapping[str, PromptContract]) -> None:
    """Refuse a task whose instruction leaves a model's limit no room for a text, before anything is embedded.

    Known here are the instructions of mteb tasks and the contracts' own; one that stands with a query is met when its
    text is embedded, as are all of a model that sentence-transformers runs, whose limits no contract says.

    Raises:
        InstructionTooLong: names task and model, the limit and the length.
    """
    tokenizers: dict[Path | NodeModel, Any] = {}
    for unit in units:
        folder, contract = unit.scorer.folder, contracts.get(unit.scorer.contract_hash)
        if folder is None or contract is None or unit.task.kind != "mteb":
            continue
        model = open_model(folder)
        if model.beyond is not None:
            continue
        if folder not in tokenizers:
            tokenizers[folder] = load_tokenizer(model.transformer)
        task = _mteb_task(unit.task)
        ranks = isinstance(task, AbsTaskRetrieval)  # elsewhere all texts play the same part
        kinds = (PromptType.query, PromptType.document) if ranks else (None,)
        for kind in kinds:
            role = role_of(task.metadata, kind, contract, unit.task.instructed)
            try:
                check_room(tokenizers[folder], contract, role.side, role.task_type, role.instruction)
            except InstructionTooLong as error:
                raise InstructionTooLong(f"{unit.task.where}, model {unit.scorer.name!r}: {error}") from error


def task_size(task: AbsTask, subset: str | None = None) -> dict[str, int]:
    """``{"queries": …, "documents": …}`` of a loaded retrieval task, ``{"queries": texts}`` of any other.

    Args:
        task: loaded.
        subset: count only this one.
    """
    splits = [
        split
        for mapping in _subsets(task, subset)
        for name, split in mapping.items()
        if name in task.metadata.eval_splits
    ]
    if isinstance(task, AbsTaskRetrieval):
        return {
            "queries": sum(len(split["queries"]) for split in splits),
            "documents": sum(len(split["corpus"]) for split in splits),
        }
    return {"queries": sum(len(split) for split in splits)}


def _subsets(task: AbsTask, subset: str | None) -> list[Any]:
    """Mappings from split to data, one a language subset; aggregated tasks hold none themselves."""
    dataset = task.dataset or {}
    names = task.hf_subsets if subset is None else [subset]
    return [dataset[name] for name in names if name in dataset] or [dataset]


def _mteb_task(spec: TaskSpec) -> AbsTask:
    if spec.limit is not None:
        raise DataError(
            f"{spec.where}: limit is {spec.limit}; an mteb task takes none, "
            "because its scores would not compare with anybody's"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mteb's advice on newer versions of a task; the user named this one
        try:
            if spec.benchmark is not None:
                members = mteb.get_benchmark(spec.benchmark).tasks
                found = next(member for member in members if member.metadata.name == spec.name)
            else:
                found = mteb.get_task(spec.name)
        except KeyError as error:
            hint = str(error.args[0]).removeprefix("KeyError: ")
            raise DataError(f"{spec.where}: no mteb task has this name ({hint})") from error
    if found.metadata.modalities != ["text"]:
        raise DataError(f"{spec.where}: is about {', '.join(found.metadata.modalities)}; allowed: text only")
    if spec.languages is not None:
        there = list(found.hf_subsets)
        found = found.filter_languages(list(spec.languages))
        if not found.hf_subsets:
            raise DataError(f"{spec.where}: languages is {list(spec.languages)}; the task has {there}")
    return found


def _loaded(task: AbsTask, where: str) -> AbsTask:
    if hasattr(task.metadata, "tasks"):  # an aggregate: mteb loads its parts one by one
        return task
    try:
        task.load_data()
        if isinstance(task, AbsTaskRetrieval):
            task.convert_v1_dataset_format_to_v2(num_proc=None)
    except Exception as error:  # the hub and dataset clients raise a dozen unrelated types
        raise DataError(
            f"{where}: the dataset {task.metadata.dataset['path']!r} is neither cached nor reachable "
            f"({type(error).__name__}: {first_line(error)[:200]}); run once with network access, or use kind beir or local"
        ) from error
    return task


def _given(corpus: Artefact | None, spec: TaskSpec) -> Artefact:
    if corpus is None:
        raise DataError(f"{spec.where}: kind heldout needs the corpus of a run; use kind local, beir or mteb")
    return corpus


def _folder(spec: TaskSpec) -> Path:
    return located(str(spec.path))
