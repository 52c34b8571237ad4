"""Who gets scored: model folders, the teacher and BM25, each with the identity its results are kept under."""

import hashlib
from pathlib import Path

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.contents import is_trusted
from embedloom.encoder.foreign import beyond_encoder, contract_of
from embedloom.errors import ConfigError, DataError
from embedloom.evaluation.bm25 import BM25_NAME, bm25_revision, check_bm25
from embedloom.evaluation.jobs import Group, Scorer
from embedloom.instructions import CONTRACT_FILE, PromptContract
from embedloom.retrieval.sentence_teacher import sentence_contract
from embedloom.storage import Place
from embedloom.verdict import GATE_FILE, INT8_FILE

_BLOCK_BYTES = 16 * 2**20
_MODULE_WEIGHTS = {"model.safetensors", "pytorch_model.bin"}


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
    revision = model_revision(folder)
    contract = scored_contract(folder)
    contracts[contract.hash] = contract
    return Scorer(name, group, label, revision, folder.absolute(), contract.hash)


def runs_in_library(folder: Path) -> bool:
    """Whether a model is scored through sentence-transformers, because our encoder cannot compute it."""
    return not (folder / CONTRACT_FILE).exists() and beyond_encoder(folder) is not None


def scored_contract(folder: Path) -> PromptContract:
    """The contract by which a model folder is scored.

    Raises:
        DataError: a broken one.
    """
    return sentence_contract(folder) if runs_in_library(folder) else contract_of(folder)


def model_revision(folder: Path) -> str:
    """Identity of a model folder: its artefact's fingerprint, or a hash over weights and configuration.

    Raises:
        DataError: no weights, or a corrupt manifest.
    """
    if (folder / MANIFEST_FILE).is_file():
        return Artefact.open(Place(str(folder))).fingerprint
    weights = sorted(folder.glob("*.safetensors"))
    # Of layers after the pooling; the files of a model that has none are those above.
    weights += [path for path in sorted(folder.glob("*/*")) if path.name in _MODULE_WEIGHTS]
    if not weights:
        raise DataError(f"{folder}: no *.safetensors, so this is not a model folder with weights")
    digest = hashlib.blake2b(digest_size=8)
    written_afterwards = (GATE_FILE, INT8_FILE)
    configs = [path for path in sorted(folder.glob("*.json")) if path.name not in written_afterwards]
    code = sorted(folder.rglob("*.py")) if is_trusted(folder) else []
    for path in [*configs, *weights, *code]:
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
