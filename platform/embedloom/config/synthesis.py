"""Section about LLM-written rows: who writes, what, in which languages, and what is kept."""

from collections import Counter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from embedloom.config.base import FrozenConfig
from embedloom.config.families import FamilyUnion
from embedloom.config.languages import check_languages
from embedloom.config.quality import QualityConfig
from embedloom.config.resources import PoolConfig


class EngineOptions(FrozenConfig):
    """How vLLM runs one generator.

    A text depends on what else is decoded in the same step (the shape of a matrix product decides how it rounds):
    measured with SmolLM2 on CPU in bfloat16, 2 of 32 texts change when 8 instead of 32 prompts are in the batch. One
    shard in flight makes a step's company a function of the shard alone, so a rerun gives the same texts; more in
    flight keep the batch full through a long tail, and then texts, never ids lost or twice, may differ between runs.
    """

    max_model_tokens: int = Field(default=1024, ge=128)  # prompt and answer together
    sequences: int | None = Field(default=None, ge=1)  # decoded together; null: 32 on CPU, vLLM's own on GPU
    kv_cache_gib: float | None = Field(
        default=None, gt=0
    )  # null: 1 on CPU, what gpu_memory_share leaves on GPU
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)  # of a GPU, weights and cache together
    prefix_caching: bool = False  # a cached prefix rounds differently, so a rerun may give other texts
    shards_in_flight: int | None = Field(default=None, ge=1, le=16)  # null: 1 on CPU, 4 on GPU
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto on CPU: bfloat16 if in hardware
    # vLLM's own batch-invariant kernels (CUDA only, slower): several shards in flight, yet the same texts again.
    batch_invariant: bool = False


class Generator(FrozenConfig):
    """One LLM of the mix: its share of the rows, its actors, its engine."""

    model: str
    weight: float = Field(default=1.0, ge=0)
    pool: PoolConfig | None = None  # null: the profile's pool for synthesis
    engine: EngineOptions = EngineOptions()
    # A model below about a billion parameters: shorter prompts, answers bounded by patterns.
    small: bool = False


class Sampling(FrozenConfig):
    """How tokens are drawn; a family may say otherwise."""

    sampling_temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=64, ge=8)


class TaskConfig(FrozenConfig):
    """Step one of two: task sentences brainstormed for a family, drawn from in step two (arXiv 2511.07025 §6.2)."""

    count: int = Field(default=20, ge=1)  # task sentences per family that needs them, over all generators
    # Share of the rows whose task comes from another generator; with one generator it has no effect.
    cross_model: float = Field(default=1.0, ge=0, le=1)


class SynthesisConfig(FrozenConfig):
    """Rows written by a mix of LLMs (arXiv 2511.07025 §4.3, §6.2)."""

    generators: tuple[Generator, ...] = Field(min_length=1)
    families: tuple[FamilyUnion, ...] = Field(min_length=1)
    languages: dict[str, float] = Field(default_factory=lambda: {"eng": 1.0})  # ISO 639-3 -> weight
    sampling: Sampling = Sampling()
    tasks: TaskConfig = TaskConfig()
    quality: QualityConfig = QualityConfig()
    # Share of the rows asked for that will likely be kept: the first round asks for that much more, and a second
    # round, with its start of every engine, may not be needed. Rows above the quota are not kept.
    expected_acceptance: float = Field(default=1.0, gt=0, le=1)
    # Answers asked for per answer needed, before a generator that is always refused stops the stage.
    max_attempts_per_row: float = Field(default=4.0, ge=1)
    shard_rows: int = Field(default=128, ge=1)  # answers per exactly-once shard

    @model_validator(mode="after")
    def _mix_is_possible(self) -> "SynthesisConfig":
        total = sum(generator.weight for generator in self.generators)
        if not total > 0:
            raise ValueError(f"generators: the weights sum to {total:g}; at least one must be above 0")
        _refuse_repeated("generators", "model", [generator.model for generator in self.generators])
        _refuse_repeated("families", "name", [family.key for family in self.families])
        for family in self.families:
            for language in family.languages or self.languages:
                family.document_weights(language)
        return self

    @field_validator("languages")
    @classmethod
    def _languages_are_known(cls, weights: dict[str, float]) -> dict[str, float]:
        check_languages(weights)
        return weights


def _refuse_repeated(section: str, what: str, names: list[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{section}: {what} {name!r} stands {times} times; give it once")
