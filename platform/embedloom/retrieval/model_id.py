"""What tells one embedding job from another before it runs: the weights, the input, the settings."""

from pathlib import Path
from typing import Any

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.config.mining import RescoringConfig
from embedloom.config.use import EmbeddingConfig
from embedloom.retrieval.fingerprints import folder_fingerprint
from embedloom.retrieval.inputs import input_state
from embedloom.storage import Place


def model_id(folder: Path) -> str:
    """A model artefact's fingerprint; of any other folder its name and a hash of its files, ``name@0123456789abcdef``."""
    if (folder / MANIFEST_FILE).is_file():
        return Artefact.open(Place(str(folder)), "model").fingerprint
    return f"{folder.name}@{folder_fingerprint(folder)}"


def embedding_state(config: EmbeddingConfig, own_models: set[str]) -> tuple[Any, ...]:
    """What of the embedding section decides the vectors; inputs and models of the run itself are left to the graph.

    Where vectors are taken over from is left out: it does not change them.
    """
    states: list[Any] = [] if config.corpus is None else [input_state(config.corpus)]
    if config.model not in own_models and Path(config.model).expanduser().is_dir():
        states.append(model_id(Path(config.model).expanduser()))
    return config.model_dump(mode="json", exclude={"previous"}), states


def rescoring_state(config: RescoringConfig) -> tuple[Any, ...]:
    """What of the rescoring section decides the scores: its values and, of a local folder, the model's files."""
    folder = Path(config.model).expanduser()
    return config, folder_fingerprint(folder) if folder.is_dir() else None
