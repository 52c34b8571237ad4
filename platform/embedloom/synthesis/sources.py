"""The models a section names: generators, judge and the round trip's teacher, ready to be opened in actors."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from embedloom.config.synthesis import SynthesisConfig
from embedloom.config.teacher import Teacher
from embedloom.encoder.registry import resolve_on_node
from embedloom.retrieval.embedder import EmbedderSource
from embedloom.retrieval.teachers import teacher_source


def model_sources(config: SynthesisConfig) -> dict[str, Callable[[], Path]]:
    """Per model what gives its local folder on the machine where it is called; nothing is fetched yet."""
    names = [generator.model for generator in config.generators]
    if config.quality.judge is not None:
        names.append(config.quality.judge.model)
    return {name: partial(resolve_on_node, name) for name in names}


def round_trip_teacher(config: SynthesisConfig, teachers: Sequence[Teacher]) -> EmbedderSource | None:
    """The first mining teacher, where the section checks rows with it."""
    return teacher_source(teachers[0]) if config.quality.round_trip else None
