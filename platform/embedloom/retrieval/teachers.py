"""From the config section of a teacher to what opens it: our encoder, sentence-transformers, or an endpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedloom.config.teacher import Teacher
from embedloom.encoder.architecture import position_limit, read_config
from embedloom.encoder.own_code import trusted_copy
from embedloom.encoder.registry import open_model, resolve_model
from embedloom.errors import ConfigError
from embedloom.instructions import CONTRACT_FILE, DEFAULT_INSTRUCTIONS, PLAIN_TEMPLATE, Templates
from embedloom.model_folder import ModelFolder
from embedloom.retrieval.embedder import EmbedderSource, EncoderSource
from embedloom.retrieval.endpoint_teacher import EndpointSource
from embedloom.retrieval.sentence_teacher import SentenceTransformerSource


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
    model = open_model(teacher_folder(teacher))
    limits = {
        "max_query_tokens": teacher.max_query_tokens or max_query_tokens,
        "max_document_tokens": teacher.max_document_tokens or max_document_tokens,
    }
    check_positions(teacher.model, model, limits)
    if pick_engine(teacher, model) == "encoder":
        own = model.contract
        changes: dict[str, Any] = {key: limit for key, limit in limits.items() if limit is not None}
        contract = own.model_copy(update={**changes, "instructions": {**own.instructions, **named}})
        return EncoderSource(teacher.model, model.path, contract, teacher.dtype)
    return SentenceTransformerSource(
        name=teacher.model,
        folder=model.path,
        query_template=teacher.query_template,
        document_template=teacher.document_template,
        instructions={**DEFAULT_INSTRUCTIONS, **named},
        batch_size=teacher.batch_size,
        dtype=teacher.dtype,
        **limits,
    )


def teacher_folder(teacher: Teacher) -> Path:
    """Local folder of a teacher's weights; sentence-transformers folders may keep their config.json further down."""
    path, trust = Path(teacher.model).expanduser(), teacher.trust_remote_code
    if not (path / "modules.json").is_file():
        return resolve_model(teacher.model, trust)
    return trusted_copy(path.absolute()) if trust else path.absolute()


def pick_engine(teacher: Teacher, model: ModelFolder) -> str:
    """``encoder`` or ``sentence_transformers``.

    Raises:
        ConfigError: the engine asked for would compute something else than the model, or templates for a model with
            a contract of its own.
    """
    templates = teacher.query_template is not None or teacher.document_template is not None
    if model.layout is None:
        if templates and teacher.engine == "auto":
            raise ConfigError(
                f"teacher {teacher.model!r}: query_template and document_template do not fit, its {CONTRACT_FILE} has a template"
            )
        return "sentence_transformers" if teacher.engine == "sentence_transformers" else "encoder"
    if teacher.engine == "sentence_transformers":
        return teacher.engine
    reason = model.beyond
    if teacher.engine == "encoder" and reason:
        raise ConfigError(
            f"teacher {teacher.model!r}: engine 'encoder' cannot run it: {reason}; allowed: 'auto', 'sentence_transformers'"
        )
    return "sentence_transformers" if reason or templates else "encoder"


def check_positions(name: str, model: ModelFolder, limits: Mapping[str, int | None]) -> None:
    """Raise ConfigError for a limit (by the name of its key) above the positions that a model has."""
    if not (model.transformer / "config.json").is_file():
        return  # static embeddings have no positions
    positions = position_limit(read_config(model.transformer).get_text_config())
    for key, limit in limits.items():
        if positions is not None and limit is not None and limit > positions:
            raise ConfigError(f"{key}: {limit} is above the {positions} positions of {name!r}")


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
