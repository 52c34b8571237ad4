"""What tells one embedding job from another before it runs: the weights, the input, the settings."""

from pathlib import Path
from typing import Any

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.config.mining import RescoringConfig
from embedloom.config.use import EmbeddingConfig
from embedloom.contents import Contents, digest
from embedloom.encoder.registry import local_contents
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
    settings = config.model_dump(mode="json", exclude={"previous"})
    code = config.trust_remote_code
    if config.corpus is not None and "://" not in config.corpus:
        settings["corpus"] = None
    held = None if config.model in own_models else local_contents(config.model, code=code)
    if held is not None:
        states.append(digest(held))
        settings["model"] = None
    return settings, states


def embedding_reads(config: EmbeddingConfig, own_models: set[str]) -> dict[str, Contents]:
    """What the local files hold that the vectors are made from, by what the config calls them."""
    reads = {}
    if config.corpus is not None and isinstance(state := input_state(config.corpus), dict):
        reads[config.corpus] = state
    code = config.trust_remote_code
    held = None if config.model in own_models else local_contents(config.model, code=code)
    return reads if held is None else {**reads, config.model: held}


def rescoring_state(config: RescoringConfig) -> tuple[Any, ...]:
    """What of the rescoring section decides the scores: its values and, of a local folder, what the model holds."""
    held = local_contents(config.model, code=config.trust_remote_code)
    return config, None if held is None else digest(held)
