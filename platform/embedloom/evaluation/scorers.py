"""What is scored: model folders, the teacher, BM25 and hybrid search, each with the identity its results are kept under."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb

from embedloom.core.prompting import PromptContract
from embedloom.encoder.registry import NodeModel, open_model
from embedloom.errors import ConfigError, MissingDependency
from embedloom.evaluation.jobs import Group, Scorer

# The BM25 baseline: mteb's own, so that its score compares with the one on mteb's leaderboard.


HYBRID = "hybrid"
BM25_NAME = "mteb/baseline-bm25s"
_PACKAGES = {"bm25s": "bm25s", "Stemmer": "PyStemmer"}  # import name -> distribution


def check_bm25() -> None:
    """Raise MissingDependency if a package that mteb's BM25 needs is absent."""
    for module, distribution in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependency(distribution, "cpu", "the bm25 baseline of evaluation.baselines")


def bm25_revision() -> str:
    """mteb's revision of the baseline, which names its result folder."""
    return str(mteb.get_model_meta(BM25_NAME).revision)


def load_bm25() -> Any:
    """BM25 behind mteb's search protocol: Lucene scoring, stop words and stemmer by the task's language."""
    check_bm25()
    return mteb.get_model_meta(BM25_NAME).load_model()


def make_scorers(
    models: Mapping[str, Path | NodeModel],
    baselines: tuple[str, ...],
    teacher: tuple[str, Path | NodeModel] | None,
) -> tuple[list[Scorer], dict[str, PromptContract]]:
    """Scorers in the order in which they are reported, and the models' contracts by hash.

    Args:
        models: name -> model folder, or a model by name.
        baselines: ``bm25``, ``teacher``, ``hybrid`` (the last of the models, fused with BM25).
        teacher: name of the mining teacher, and its folder or what every node finds it by.

    Raises:
        ConfigError: a teacher is asked for and none given.
        DataError: a folder without weights, or with a broken contract.
    """
    contracts: dict[str, PromptContract] = {}
    scorers = [
        _scorer(name, "models", f"embedloom/{name}", folder, contracts) for name, folder in models.items()
    ]
    for baseline in baselines:
        if baseline == "bm25":
            check_bm25()
            scorers.append(Scorer("bm25", "baselines", BM25_NAME, bm25_revision()))
        elif baseline == HYBRID:
            folder = list(models.values())[-1]
            fused = _scorer(HYBRID, "baselines", f"embedloom/{HYBRID}", folder, contracts)
            scorers.append(replace(fused, fused=True))
        elif teacher is None:
            raise ConfigError(
                "evaluation.baselines: names 'teacher', but no teacher was given; allowed here: bm25, hybrid"
            )
        else:
            name, folder = teacher
            label = f"teacher/{name.rstrip('/').rsplit('/', 1)[-1]}"
            scorers.append(_scorer("teacher", "baselines", label, folder, contracts))
    return scorers, contracts


def _scorer(
    name: str, group: Group, label: str, folder: Path | NodeModel, contracts: dict[str, PromptContract]
) -> Scorer:
    model = open_model(folder)
    revision, contract = model.revision, model.scored_contract
    contracts[contract.hash] = contract
    return Scorer(name, group, label, revision, model.travels, contract.hash)
