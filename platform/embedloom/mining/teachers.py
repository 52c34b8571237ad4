"""The teachers a mining section names, ready to be opened in actors."""

from embedloom.config.mining import MiningConfig
from embedloom.config.teacher import Teacher
from embedloom.errors import ConfigError
from embedloom.instructions import DEFAULT_INSTRUCTIONS
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.retrieval.teachers import teacher_source


def teacher_sources(config: MiningConfig) -> list[EmbedderSource]:
    """One source per teacher, with the section's token limits and changed instructions.

    Raises:
        ConfigError: a limit above the positions a teacher has, or settings that do not fit it; the teacher is named.
        DataError: no such model.
    """
    return [_source(config, teacher, f"mining.teachers.{n}") for n, teacher in enumerate(config.teachers)]


def judge_source(config: MiningConfig) -> EmbedderSource | None:
    """The judge of the audit, if there is one; see ``teacher_sources``."""
    return None if config.audit.judge is None else _source(config, config.audit.judge, "mining.audit.judge")


def _source(config: MiningConfig, teacher: Teacher, where: str) -> EmbedderSource:
    # Instructions change only where the config's differ from the defaults; pairs bring their own in any case.
    named = {key: text for key, text in config.instructions.items() if text != DEFAULT_INSTRUCTIONS.get(key)}
    try:
        return teacher_source(
            teacher,
            max_query_tokens=config.max_query_tokens,
            max_document_tokens=config.max_document_tokens,
            instructions=named,
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
