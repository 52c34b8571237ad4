"""``embedloom embed``: any corpus to Parquet vectors and, if wanted, a FAISS index."""

from typing import Any

from embedloom.artefacts import MANIFEST_FILE, Artefact, ArtefactWriter
from embedloom.config.resources import PoolConfig
from embedloom.config.use import EmbeddingConfig
from embedloom.encoder.tokenizer import InstructionTooLong, check_room, load_tokenizer
from embedloom.errors import ConfigError, DataError
from embedloom.instructions import PromptContract
from embedloom.model_folder import ModelFolder
from embedloom.progress import note
from embedloom.retrieval.embed_rows import embed_rows
from embedloom.retrieval.embedder import EncoderSource
from embedloom.retrieval.fill_in import OWN_FOLDER, VECTORS_FOLDER
from embedloom.retrieval.index import build_index, require_faiss
from embedloom.retrieval.inputs import DOCUMENTS_FOLDER, SPLITS, check_instruction, open_input
from embedloom.retrieval.ledger import open_ledger
from embedloom.retrieval.previous import aside_of
from embedloom.retrieval.vector_files import cut_line
from embedloom.storage import Place, absolute

__all__ = ["DOCUMENTS_FOLDER", "SPLITS", "VECTORS_FOLDER", "embed_artefact"]


def embed_artefact(
    config: EmbeddingConfig, corpus: str, model: ModelFolder, pool: PoolConfig, out: ArtefactWriter
) -> Artefact:
    """Embed every text of a corpus and commit the vectors.

    Args:
        config: the embedding section.
        corpus: a corpus artefact, a file, folder or glob of Parquet or JSON lines, or a folder of text files.
        model: its id is stamped on the files.
        pool: actors and what each reserves.
        out: writer of the vectors artefact; gets ``vectors``, ``rows``, ``rejects`` and the index.

    Raises:
        DataError: an input that cannot be embedded, or an earlier artefact of another recipe.
        ConfigError: keys that do not fit the model.
        MissingDependency: an index is wanted and FAISS is not installed.
    """
    out.place.sweep()
    contract = model.contract
    config = _with_task(config, contract)
    _check(config, contract)
    tokenizer = load_tokenizer(model.transformer)
    try:
        check_room(tokenizer, contract, config.side, config.task_type, config.instruction)
    except InstructionTooLong as error:
        raise InstructionTooLong(f"embedding.instruction: {error}") from error
    recipe = {**config.recipe, "model_id": model.id, "contract_hash": contract.hash}
    earlier = _earlier(config, recipe, out.place)
    source = open_input(corpus, config, out.place)
    before = (earlier.fingerprint, earlier.place) if earlier else None
    ledger = open_ledger(source, out.place, config.shard_rows, before)
    cost = embed_rows(
        stage="embed",
        source=source,
        ledger=ledger,
        out=out.place,
        model=EncoderSource(model.id, model.path, dtype=config.compute_dtype),
        normalize=contract.normalize,
        config=config,
        pool=pool,
        previous=earlier.place if earlier else None,
    )
    details: dict[str, Any] = {
        "model_id": model.id,
        "contract_hash": contract.hash,
        "recipe": recipe,
        "previous": ledger.previous or None,
        "input": {"path": absolute(corpus), **config.columns},
    }
    if model.is_trusted:
        details["trust_remote_code"] = True
    if config.index is not None:
        details["index"] = build_index(config.index, out.place, contract.hash)
    out.place.child(OWN_FOLDER).remove()
    done = out.commit({**ledger.counts, **cost}, details)
    note("embed", cut_line(sum(ledger.own), cost))
    if out.place.is_local:
        aside_of(out.place).remove()
    return done


def _with_task(config: EmbeddingConfig, contract: PromptContract) -> EmbeddingConfig:
    """The section with the task that its texts are taken for as ``task_type``: the model's default where it names none.

    Raises:
        ConfigError: a task that the model does not know.
    """
    if config.task is not None and not contract.knows(config.task):
        raise ConfigError(
            f"embedding.task: {config.task!r} is unknown; allowed: {', '.join(contract.known_tasks)}"
        )
    stated = config.task_type if "task_type" in config.model_fields_set else contract.task_type_of()
    return config.model_copy(update={"task_type": config.task or stated})


def _check(config: EmbeddingConfig, contract: PromptContract) -> None:
    """What can be known before any actor starts."""
    kind = contract.task_type_of(config.task_type)
    check_instruction(config.model_copy(update={"task_type": kind}), contract.symmetric_task_types)
    if config.index is not None:
        require_faiss()
    trained = contract.matryoshka_dimensions
    if config.dimensions is None or config.allow_truncation or config.dimensions in (trained or ()):
        return
    allowed = (
        f"allowed: {', '.join(map(str, trained))}"
        if trained
        else "the model does not say it was trained for any"
    )
    raise ConfigError(
        f"embedding.dimensions: {config.dimensions}; {allowed} (matryoshka_dimensions of its contract.json); "
        "embedding.allow_truncation: true cuts regardless"
    )


def _earlier(config: EmbeddingConfig, recipe: dict[str, Any], out: Place) -> Artefact | None:
    """The artefact whose vectors may be taken: the one the config names, or the one this build replaces.

    Raises:
        DataError: the named one is not there, or its vectors are of another recipe.
    """
    if config.previous is not None:
        named = Artefact.open(Place(config.previous), "vectors")
        different = _difference(named, recipe)
        if different:
            raise DataError(
                f"embedding.previous: {config.previous}: {different}; its vectors cannot be mixed in"
            )
        return named
    if not out.is_local or not aside_of(out).exists(MANIFEST_FILE):
        return None
    replaced = Artefact.open(aside_of(out), "vectors")
    different = _difference(replaced, recipe)
    if different:
        note("embed", f"no vector of {replaced.place.uri} is taken over: {different}")
        return None
    return replaced


def _difference(artefact: Artefact, recipe: dict[str, Any]) -> str:
    """The first key in which an artefact's recipe differs, in words; empty if it is the same."""
    found = artefact.manifest["details"].get("recipe", {})
    for key, value in recipe.items():
        if found.get(key) != value:
            return f"{key} is {found.get(key)!r} there, {value!r} here"
    return ""
