"""The teachers a mining section names, ready to be opened in actors."""

from collections.abc import Callable, Sequence
from functools import lru_cache

from embedloom.config.mining import MiningConfig
from embedloom.config.teacher import Teacher
from embedloom.encoder.registry import open_model, resolve_model
from embedloom.encoder.tokenizer import load_tokenizer, prompt_ids, room_problem
from embedloom.errors import ConfigError
from embedloom.instructions import DEFAULT_INSTRUCTIONS, Side, Templates
from embedloom.retrieval.cross_encoder import CrossEncoderSource, PairScorerSource, check_cross_encoder
from embedloom.retrieval.embedder import EmbedderSource, EncoderSource
from embedloom.retrieval.teachers import check_positions, teacher_source


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


def rescoring_source(config: MiningConfig) -> PairScorerSource:
    """What opens the cross-encoder of the rescoring section; a model of the hub is fetched here.

    Raises:
        ConfigError: no such section, or a limit above the model's positions.
        DataError: no such model, or no cross-encoder.
    """
    section = config.rescoring
    if section is None:
        raise ConfigError("mining.rescoring: the section is missing")
    folder = resolve_model(section.model, section.trust_remote_code)
    check_cross_encoder(folder)
    try:
        check_positions(section.model, open_model(folder), {"max_tokens": section.max_tokens})
    except ConfigError as error:
        raise ConfigError(f"mining.rescoring: {error}") from error
    return CrossEncoderSource(
        name=section.model,
        folder=folder,
        templates=Templates(query=section.query_template, instructions=config.instructions),
        max_tokens=section.max_tokens,
        batch_size=section.batch_size,
        dtype=section.dtype,
    )


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


def room_check(teachers: Sequence[EmbedderSource]) -> Callable[[str, Side, str, str], str | None]:
    """What says why one of the teachers would see next to nothing of a text (side, task type, instruction), if so.

    Known of teachers that our encoder runs; sentence-transformers' refuse such a text when they meet it.
    """
    encoders = [
        (source.name, load_tokenizer(open_model(source.folder).transformer), source.contract)
        for source in teachers
        if isinstance(source, EncoderSource) and source.contract is not None
    ]

    @lru_cache(maxsize=4096)
    def problems(side: Side, task_type: str, instruction: str) -> list[tuple[int, str]]:
        found = []
        for number, (name, tokenizer, contract) in enumerate(encoders):
            prompt = contract.format("", side, task_type, instruction)
            problem = room_problem(tokenizer, contract, side, prompt)
            if problem is not None:
                found.append((number, f"teacher {name!r}: {problem}"))
        return found

    def too_long(text: str, side: Side, task_type: str, instruction: str) -> str | None:
        for number, problem in problems(side, task_type, instruction):
            _, tokenizer, contract = encoders[number]
            whole = prompt_ids(tokenizer, contract.format(text, side, task_type, instruction))
            if len(whole) > contract.max_tokens(side):
                return problem
        return None

    return too_long
