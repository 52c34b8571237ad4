"""From the config section of a teacher to what opens it: our encoder, sentence-transformers, or an endpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedloom.config.teacher import Teacher
from embedloom.encoder.registry import resolve_model
from embedloom.encoder.sidecars import derive_contract
from embedloom.errors import ConfigError
from embedloom.instructions import CONTRACT_FILE, DEFAULT_INSTRUCTIONS, PLAIN_TEMPLATE, PromptContract
from embedloom.retrieval.embedder import EmbedderSource, EncoderSource
from embedloom.retrieval.endpoint_teacher import EndpointSource
from embedloom.retrieval.sentence_teacher import SentenceTransformerSource
from embedloom.retrieval.templates import Templates

_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
}
_ORDERS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


def teacher_source(
    teacher: Teacher,
    *,
    max_query_tokens: int | None = None,
    max_document_tokens: int | None = None,
    instructions: Mapping[str, str] | None = None,
) -> EmbedderSource:
    """What opens this teacher; a model of the hub is fetched here, before any actor starts.

    Args:
        teacher: its section.
        max_query_tokens: limit where the section has none; None: the model's own. An endpoint cuts by itself.
        max_document_tokens: the same of documents.
        instructions: by task type, where they differ from the package's defaults.

    Raises:
        ConfigError: an engine that does not fit the model, or a limit above its positions.
        DataError: no such model.
    """
    named = {key: text for key, text in (instructions or {}).items() if text != DEFAULT_INSTRUCTIONS.get(key)}
    if teacher.engine == "openai":
        return _endpoint(teacher, named)
    folder = teacher_folder(teacher)
    limits = {
        "max_query_tokens": teacher.max_query_tokens or max_query_tokens,
        "max_document_tokens": teacher.max_document_tokens or max_document_tokens,
    }
    check_positions(teacher.model, folder, limits)
    if pick_engine(teacher, folder) == "encoder":
        contract = _contract(folder, limits, named)
        return EncoderSource(teacher.model, folder, contract, teacher.dtype)
    return SentenceTransformerSource(
        name=teacher.model,
        folder=folder,
        query_template=teacher.query_template,
        document_template=teacher.document_template,
        instructions={**DEFAULT_INSTRUCTIONS, **named},
        batch_size=teacher.batch_size,
        dtype=teacher.dtype,
        **limits,
    )


def teacher_folder(teacher: Teacher) -> Path:
    """Local folder of a teacher's weights; sentence-transformers folders may keep their config.json further down."""
    path = Path(teacher.model).expanduser()
    return path.absolute() if (path / "modules.json").is_file() else resolve_model(teacher.model)


def pick_engine(teacher: Teacher, folder: Path) -> str:
    """``encoder`` or ``sentence_transformers``.

    Raises:
        ConfigError: the engine asked for would compute something else than the model, or templates for a model with
            a contract of its own.
    """
    templates = teacher.query_template is not None or teacher.document_template is not None
    if (folder / CONTRACT_FILE).is_file():
        if templates and teacher.engine == "auto":
            raise ConfigError(
                f"teacher {teacher.model!r}: query_template and document_template do not fit, its {CONTRACT_FILE} has a template"
            )
        return "sentence_transformers" if teacher.engine == "sentence_transformers" else "encoder"
    if teacher.engine == "sentence_transformers":
        return teacher.engine
    reason = beyond_encoder(folder)
    if teacher.engine == "encoder" and reason:
        raise ConfigError(
            f"teacher {teacher.model!r}: engine 'encoder' cannot run it: {reason}; allowed: 'auto', 'sentence_transformers'"
        )
    return "sentence_transformers" if reason or templates else "encoder"


def beyond_encoder(folder: Path) -> str | None:
    """Why our encoder would compute something else than sentence-transformers does; None if it would not.

    A contract can say one pooling and a normalisation. Further layers, mixed poolings, lower-casing or prompts in
    the model's files would be dropped without a word.

    Args:
        folder: a foreign model folder.
    """
    modules = _read(folder / "modules.json", [])
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if not modules:
        return "it has no modules.json"
    if kinds not in _ORDERS or modules[0].get("path"):
        return f"its modules are {kinds}, where a contract describes Transformer, Pooling and Normalize"
    if any(not str(module["type"]).startswith("sentence_transformers.") for module in modules):
        return "it brings module classes of its own"
    if modules[1].get("path") != "1_Pooling" or _pooling(folder) is None:
        return "its pooling is none of mean, cls, last_token alone"
    odd = _odd_settings(_read(folder / "sentence_bert_config.json", {}))
    if odd:
        return f"sentence_bert_config.json sets {odd}"
    config = _read(folder / "config_sentence_transformers.json", {})
    prompts = {name: text for name, text in (config.get("prompts") or {}).items() if text}
    if prompts:
        return f"it has prompts {sorted(prompts)}"
    return "it cuts its vectors (truncate_dim)" if config.get("truncate_dim") else None


def _odd_settings(config: Mapping[str, Any]) -> list[str]:
    """Settings of a Transformer module that a contract cannot say, such as lower-casing or chat messages."""
    plain = {
        "max_seq_length": config.get("max_seq_length"),
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    }
    return sorted(key for key, value in config.items() if value and value != plain.get(key))


def _pooling(folder: Path) -> str | None:
    """The one pooling mode of a model, None if it is another or several."""
    content = _read(folder / "1_Pooling" / "config.json", {})
    mode = content.get("pooling_mode")
    if mode is not None:
        return mode if mode in _POOLINGS.values() else None
    modes = [key for key, value in content.items() if key.startswith("pooling_mode_") and value]
    return _POOLINGS.get(modes[0]) if len(modes) == 1 else None


def _contract(folder: Path, limits: Mapping[str, int | None], named: Mapping[str, str]) -> PromptContract:
    """The folder's own contract, or one derived, with these limits and instructions."""
    own = PromptContract.load(folder) if (folder / CONTRACT_FILE).is_file() else derive_contract(folder)
    changes: dict[str, Any] = {key: limit for key, limit in limits.items() if limit is not None}
    return own.model_copy(update={**changes, "instructions": {**own.instructions, **named}})


def check_positions(model: str, folder: Path, limits: Mapping[str, int | None]) -> None:
    """Raise ConfigError for a limit (by the name of its key) above the positions that a model has."""
    config = _read(folder / "config.json", {})
    positions = {**config, **(config.get("text_config") or {})}.get("max_position_embeddings")
    for key, limit in limits.items():
        if positions is not None and limit is not None and limit > positions:
            raise ConfigError(f"{key}: {limit} is above the {positions} positions of {model!r}")


def _endpoint(teacher: Teacher, named: Mapping[str, str]) -> EndpointSource:
    if teacher.url is None:  # refused by the config section already
        raise ConfigError(f"teacher {teacher.model!r}: engine openai needs url")
    return EndpointSource(
        name=teacher.model,
        url=teacher.url,
        model=teacher.model,
        templates=Templates(
            query=teacher.query_template or PLAIN_TEMPLATE,
            document=teacher.document_template or PLAIN_TEMPLATE,
            instructions={**DEFAULT_INSTRUCTIONS, **named},
        ),
        api_key_env=teacher.api_key_env,
        batch_size=teacher.batch_size,
        concurrency=teacher.concurrency,
        timeout_seconds=teacher.timeout_seconds,
        max_retries=teacher.max_retries,
        max_characters=teacher.max_characters,
    )


def _read(path: Path, default: Any) -> Any:
    """JSON of a model file, or the default where the model has no such file."""
    return json.loads(path.read_text()) if path.is_file() else default
