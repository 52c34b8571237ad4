"""Before anything starts: what a run needs on this machine and does not have.

Every check is cheap: it looks for packages and files, and reads no more than a column. ``run`` refuses the first problem,
``plan`` lists all of them.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from embedloom.compute.generation import api_key
from embedloom.config.cluster import Profile
from embedloom.config.evaluation import EvaluationTask
from embedloom.config.mining import MiningConfig
from embedloom.config.reranker import RerankerConfig
from embedloom.config.run import Run, RunConfig
from embedloom.config.serving import ServingConfig
from embedloom.config.synthesis import Generator, JudgeCheck, SynthesisConfig
from embedloom.config.training import TrainingConfig, TrainingSource
from embedloom.core.storage import FILESYSTEMS, files_at, located
from embedloom.encoder.registry import check_model_name
from embedloom.errors import ConfigError, DataError, MissingDependency, UserError
from embedloom.evaluation.local_layout import check_beir, check_local_split, find_local_tasks
from embedloom.synthesis.prices import waves
from embedloom.synthesis.prompts_used import local_models

Check = Callable[[], object]

_PACKAGES = {
    "mine": (("faiss", "cpu"),),
    "train": (("deepspeed", "cpu"),),
    "reranker": (("deepspeed", "cpu"), ("mteb", "cpu")),
    "evaluate": (("mteb", "cpu"), ("bm25s", "cpu")),
    "gate": (("mteb", "cpu"),),
    "synthesize": (("vllm", "cpu"),),
}


def preflight(run: Run, verbs: set[str]) -> None:
    """Fail before any actor starts if something that these verbs need is missing or named wrongly.

    Raises:
        MissingDependency: naming the package and the extra.
        DataError: a model, file or split that does not exist; names the config key.
    """
    for problem in problems(run, verbs):
        raise problem


def problems(run: Run, verbs: set[str]) -> Iterator[UserError]:
    """What would stop these verbs here, in the order of the pipeline."""
    for check in _checks(run, verbs):
        try:
            check()
        except UserError as error:
            yield error


def check_benchmark_names(run: Run, verbs: set[str]) -> None:
    """Ask mteb for the tasks and benchmarks that a run names; imports it, which takes seconds, so not for a plan.

    Raises:
        ConfigError, DataError: a name that mteb does not know, or a task that is not about text.
    """
    config, named = run.config, ("mteb", "benchmark")
    asked = [
        task for task in config.evaluation.tasks if verbs & {"evaluate", "reranker"} and task.kind in named
    ]
    if "train" in verbs and config.training.dev is not None:
        asked += [task for task in config.training.dev.tasks if task.kind in named]
    if not asked:
        return
    from embedloom.evaluation.specs import expand_tasks
    from embedloom.evaluation.tasks import check_task

    for task in asked:
        for spec in expand_tasks([task]):
            check_task(spec, None)


def looks_elsewhere(profile: Profile) -> bool:
    """Whether a profile's runs read their files on other machines than this one."""
    return profile.backend == "existing"


def _checks(run: Run, verbs: set[str]) -> Iterator[Check]:
    config = run.config
    gpu = run.profile.stages.synthesis.gpus > 0
    yield partial(_check_filesystem, config.run.output_dir)
    yield from _package_checks(run, verbs, gpu)
    if verbs & {"encoder", "corpus"}:
        yield partial(check_model_name, config.encoder.base, "encoder.base")
    if "synthesize" in verbs and config.synthesis is not None:
        yield from _synthesis_checks(config.synthesis, config.mining, run)
    if "mine" in verbs:
        yield partial(check_teacher_limits, config)
    if verbs & {"mine", "evaluate"}:
        yield from _mining_checks(config.mining, "mine" in verbs)
    if "train" in verbs:
        yield partial(check_training_packages, config.training, run.profile.stages.training.gpus > 0)
        yield from _source_checks(config.training)
        yield from _task_checks(
            run, "training.dev.tasks", () if config.training.dev is None else config.training.dev.tasks
        )
    if "reranker" in verbs and config.reranker is not None:
        yield from _reranker_checks(run, config.reranker)
    if "merge" in verbs and config.merging.search is not None:
        yield from _task_checks(run, "merging.search.tasks", config.merging.search.tasks)
        yield from _task_checks(run, "merging.search.check_tasks", config.merging.search.check_tasks)
    if "evaluate" in verbs:
        yield from _task_checks(run, "evaluation.tasks", config.evaluation.tasks)
        yield partial(
            _check_path, config.evaluation.pool, "evaluation.pool", "a Parquet file or an mteb results folder"
        )
    if "embed" in verbs:
        own = {"merged", "base", *(one.name for one in config.training.runs)}
        if config.embedding.model not in own:
            yield partial(check_model_name, config.embedding.model, "embedding.model")
        yield partial(
            _check_path, config.embedding.corpus, "embedding.corpus", "a file, a folder, a glob or null"
        )


def _package_checks(run: Run, verbs: set[str], gpu: bool) -> Iterator[Check]:
    needs = _PACKAGES if run.config.merging.search is None else {**_PACKAGES, "merge": _PACKAGES["evaluate"]}
    section = run.config.synthesis
    for verb in sorted(verbs):
        if verb == "synthesize" and section is not None and not local_models(section):
            continue
        for package, extra in needs.get(verb, ()):
            yield partial(_check_package, package, "gpu" if gpu else extra, f"`embedloom {verb}`")
    if "embed" in verbs and run.config.embedding.index is not None:
        yield partial(_check_package, "faiss", "gpu" if gpu else "cpu", "embedding.index")
    for number, source in enumerate(run.config.corpus.sources if "corpus" in verbs else ()):
        if source.format == "huggingface":
            yield partial(_check_package, "datasets", "cpu", f"corpus.sources.{number}: format huggingface")


def check_training_packages(config: TrainingConfig, gpu: bool) -> None:
    """Fail before training starts if a package is missing that only some of its options need.

    Args:
        config: the training section.
        gpu: whether workers reserve GPUs; decides which extra has the engine.

    Raises:
        MissingDependency: naming the option and how to install the package.
    """
    engines = "gpu" if gpu else "cpu"
    wanted: list[tuple[str, str, str]] = [
        (name, name, f"training.trackers: {name}") for name in config.trackers if name != "tensorboard"
    ]
    if config.dev is not None:
        wanted.append(("mteb", engines, "training.dev"))
    if config.lora is not None:
        wanted.append(("peft", engines, "training.lora"))
    if "vllm" in config.parity:
        wanted.append(("vllm", engines, "training.parity: vllm"))
    for package, extra, option in wanted:
        _check_package(package, extra, option)


def _synthesis_checks(config: SynthesisConfig, mining: MiningConfig, run: Run) -> Iterator[Check]:
    named: list[tuple[str, Generator | JudgeCheck]] = [
        (f"synthesis.generators.{index}", one) for index, one in enumerate(config.generators)
    ]
    named += [("synthesis.quality.judge", config.quality.judge)] if config.quality.judge is not None else []
    for where, one in named:
        if one.endpoint is None:
            yield partial(check_model_name, one.model, f"{where}.model")
        elif not looks_elsewhere(run.profile):
            yield partial(api_key, one.endpoint, f"{where}.endpoint")
    if config.quality.round_trip is not None and mining.teachers[0].engine != "openai":
        yield partial(check_model_name, mining.teachers[0].model, "mining.teachers.0")
    yield partial(waves, config.generators, run.profile.stages.synthesis)


def _mining_checks(config: MiningConfig, mines: bool) -> Iterator[Check]:
    teachers = [(f"mining.teachers.{index}", teacher) for index, teacher in enumerate(config.teachers)]
    if mines and config.audit.judge is not None:
        teachers.append(("mining.audit.judge", config.audit.judge))
    for where, teacher in teachers:
        if teacher.engine == "openai":
            yield partial(_check_package, "openai", "openai", f"{where}: engine openai")
        else:
            yield partial(check_model_name, teacher.model, where)
    if mines and config.rescoring is not None:
        yield partial(check_model_name, config.rescoring.model, "mining.rescoring.model")


def check_teacher_limits(config: RunConfig) -> None:
    """Refuse chunks that a teacher of mining would not read to their ends.

    Defaults of both keys are no such wish: there the cut texts are counted and said by mining alone.

    Raises:
        ConfigError: naming both keys.
    """
    chunk = config.corpus.chunk_tokens
    stated = "chunk_tokens" in config.corpus.model_fields_set
    for number, teacher in enumerate(config.mining.teachers):
        own = teacher.max_document_tokens
        limit = config.mining.max_document_tokens if own is None else own
        key = "mining.max_document_tokens" if own is None else f"mining.teachers.{number}.max_document_tokens"
        chosen = stated or own is not None or "max_document_tokens" in config.mining.model_fields_set
        if teacher.engine != "openai" and chunk is not None and limit < chunk and chosen:
            raise ConfigError(
                f"{key} is {limit}, below corpus.chunk_tokens {chunk}: the teacher would not read chunks to their ends; "
                f"allowed: {chunk} or more, or smaller chunks"
            )


def _reranker_checks(run: Run, section: RerankerConfig) -> Iterator[Check]:
    yield partial(check_model_name, section.base, "reranker.base")
    for tracker in (name for name in section.trackers if name != "tensorboard"):
        yield partial(_check_package, tracker, tracker, f"reranker.trackers: {tracker}")
    for place, source in enumerate(section.sources):
        yield partial(_check_source, source, f"reranker.sources.{place}")
    yield from _task_checks(run, "evaluation.tasks", run.config.evaluation.tasks)


def _source_checks(config: TrainingConfig) -> Iterator[Check]:
    for number, stage in enumerate(config.stages):
        for place, source in enumerate(stage.sources):
            yield partial(_check_source, source, f"training.stages.{number}.sources.{place}")


def _check_source(source: TrainingSource, where: str) -> None:
    _check_path(source.path, f"{where}.path", f"a file or folder of format {source.format}")
    for name, path in source.local_texts.items():
        _check_path(path, f"{where}.local_texts.{name}", "a file or folder")


def _check_path(path: str | None, where: str, allowed: str) -> None:
    """Raise DataError if a local path has no file; object stores are asked by what reads them."""
    if path is None or "://" in path:
        return
    if not files_at(path):
        raise DataError(f"{where}: {path!r} does not exist or is empty; allowed: {allowed}")


def _check_package(package: str, extra: str, needed_for: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(package, extra, needed_for)


def _check_filesystem(folder: str) -> None:
    scheme = folder.partition("://")[0] if "://" in folder else ""
    if scheme in FILESYSTEMS:
        package, extra = FILESYSTEMS[scheme]
        _check_package(package, extra, f"run.output_dir: {scheme}://")


def _task_checks(run: Run, key: str, tasks: Sequence[EvaluationTask]) -> Iterator[Check]:
    for number, task in enumerate(tasks):
        yield partial(_check_task, run, task, f"{key}.{number} ({task.name!r})")


def _check_task(run: Run, task: EvaluationTask, where: str) -> None:
    """Raise DataError if the files of a task, or the pairs of a held-out one, have not the split that is asked for."""
    path = located(task.path or "")
    if task.kind == "beir":
        check_beir(path, task.split, where)
    elif task.kind == "local":
        for local in find_local_tasks(path, where):
            check_local_split(local, task.split, where)
    elif task.kind == "heldout":
        corpus = run.config.corpus
        if not corpus.datasets:
            raise DataError(
                f"{where}: kind heldout scores held-out pairs, and no source of the corpus holds pairs; allowed: "
                "corpus.sources with query_column or query_from (or of format beir or python_docs), or tasks of kind local, beir or mteb"
            )
        share = getattr(corpus.split, task.split)
        if not share:
            raise DataError(
                f"{where}: split {task.split} is asked for, but corpus.split.{task.split} is {share:g}; allowed: a share "
                "above 0, or another split"
            )


def check_port(config: ServingConfig, profile: Profile) -> None:
    """Fail before Ray starts if the endpoint could not listen.

    Raises:
        ConfigError: the port is in use, or the host is not one of this machine.
    """
    if looks_elsewhere(profile) or "RAY_ADDRESS" in os.environ:
        return  # there, an endpoint that runs already is replaced, and another machine may listen
    from embedloom.serving.listener import bound_socket

    bound_socket(config.host, config.port).close()
