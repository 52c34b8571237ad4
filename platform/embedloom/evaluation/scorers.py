"""Who gets scored: model folders, the teacher and BM25, each with the identity its results are kept under."""

from pathlib import Path

from embedloom.encoder.registry import open_model
from embedloom.errors import ConfigError
from embedloom.evaluation.bm25 import BM25_NAME, bm25_revision, check_bm25
from embedloom.evaluation.jobs import Group, Scorer
from embedloom.instructions import PromptContract


def make_scorers(
    models: dict[str, Path], baselines: tuple[str, ...], teacher: tuple[str, Path] | None
) -> tuple[list[Scorer], dict[str, PromptContract]]:
    """Scorers in the order in which they are reported, and the models' contracts by hash.

    Args:
        models: name -> model folder.
        baselines: ``bm25``, ``teacher``.
        teacher: name and folder of the mining teacher.

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
        elif teacher is None:
            raise ConfigError(
                "evaluation.baselines: names 'teacher', but no teacher was given; allowed here: bm25"
            )
        else:
            name, folder = teacher
            label = f"teacher/{name.rstrip('/').rsplit('/', 1)[-1]}"
            scorers.append(_scorer("teacher", "baselines", label, folder, contracts))
    return scorers, contracts


def _scorer(
    name: str, group: Group, label: str, folder: Path, contracts: dict[str, PromptContract]
) -> Scorer:
    model = open_model(folder)
    revision, contract = model.revision, model.scored_contract
    contracts[contract.hash] = contract
    return Scorer(name, group, label, revision, model.path, contract.hash)
