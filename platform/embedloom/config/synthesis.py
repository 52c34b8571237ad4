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

    max_model_tokens: int = Field(
        default=1024,
        ge=128,
        description="Longest prompt and answer together, in tokens; decides how much cache a sequence may need.",
    )
    sequences: int | None = Field(
        default=None, ge=1, description="Answers decoded together. Null: 32 on CPU, vLLM's own number on GPU."
    )
    kv_cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="Key-value cache, in GiB. Null: 1 on CPU, what gpu_memory_share leaves on GPU.",
    )
    gpu_memory_share: float = Field(
        default=0.9, gt=0, le=1, description="Share of a GPU's memory for weights and cache together (0-1)."
    )
    prefix_caching: bool = Field(
        default=False,
        description=(
            "Reuse the cache of equal prompt beginnings. Faster, but a cached prefix rounds differently, "
            "so a rerun may give other texts."
        ),
    )
    shards_in_flight: int | None = Field(
        default=None,
        ge=1,
        le=16,
        description=(
            "Shards decoded at once. One gives the same texts on every rerun; more keep the batch full "
            "while long answers end, and texts may then differ between runs. Null: 1 on CPU, 4 on GPU."
        ),
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description=(
            "Number type of the computation. auto: on CPU bfloat16 if in hardware, on GPU the model's own."
        ),
    )
    batch_invariant: bool = Field(
        default=False,
        description=(
            "vLLM's batch-invariant kernels (CUDA only, slower): the same texts on every rerun with "
            "several shards in flight."
        ),
    )


class Generator(FrozenConfig):
    """One LLM of the mix: its share of the rows, its actors, its engine."""

    model: str = Field(
        description="LLM that writes: a model folder, a Hugging Face id, a .gguf file or a registry name."
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description=(
            "Share of the accepted rows, relative to the other generators' weights; what is refused is "
            "asked for again, so the shares hold."
        ),
    )
    pool: PoolConfig | None = Field(
        default=None,
        description=(
            "Actors of this generator and what each reserves. Null: the cluster profile's pool for synthesis."
        ),
    )
    engine: EngineOptions = Field(default=EngineOptions(), description="How vLLM runs this generator.")
    small: bool = Field(
        default=False,
        description=(
            "For models below about a billion parameters: shorter prompts, and answers bounded by patterns."
        ),
    )


class Sampling(FrozenConfig):
    """How tokens are drawn; a family may say otherwise."""

    sampling_temperature: float = Field(
        default=0.7, ge=0, description="Temperature at which tokens are drawn; 0 is greedy."
    )
    top_p: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="Nucleus sampling: tokens are drawn from the most likely ones that sum to this probability.",
    )
    max_new_tokens: int = Field(default=64, ge=8, description="Longest answer, in tokens of the generator.")


class TaskConfig(FrozenConfig):
    """Step one of two: task sentences brainstormed for a family, drawn from in step two (arXiv 2511.07025 §6.2)."""

    count: int = Field(
        default=20,
        ge=1,
        description="Task sentences brainstormed per family that needs them, over all generators.",
    )
    cross_model: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description=(
            "Share of the rows whose task comes from another generator than the one that writes the row "
            "(arXiv 2511.07025 §6.2); no effect with one generator."
        ),
    )


class SynthesisConfig(FrozenConfig):
    """Rows written by a mix of LLMs (arXiv 2511.07025 §4.3, §6.2)."""

    generators: tuple[Generator, ...] = Field(
        min_length=1, description="The LLMs that write; their weights decide the shares."
    )
    families: tuple[FamilyUnion, ...] = Field(
        min_length=1, description="What is written: one section per kind of rows."
    )
    languages: dict[str, float] = Field(
        default_factory=lambda: {"eng": 1.0},
        description="ISO 639-3 code -> weight: languages of the queries, where a family states none.",
    )
    sampling: Sampling = Field(
        default=Sampling(), description="How tokens are drawn, where a family states nothing else."
    )
    tasks: TaskConfig = Field(
        default=TaskConfig(), description="Brainstorming of task sentences, step one of two."
    )
    quality: QualityConfig = Field(
        default=QualityConfig(), description="What a row must pass before it is kept."
    )
    expected_acceptance: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Share of the answers that will likely be kept (0-1). The first round asks for that much "
            "more, so that a second round, which starts every engine again, may not be needed. Rows above "
            "the quota are not kept."
        ),
    )
    max_attempts_per_row: float = Field(
        default=4.0,
        ge=1,
        description="Answers asked for per row needed, before a generator that is always refused stops the stage.",
    )
    shard_rows: int = Field(
        default=128, ge=1, description="Answers per shard, the unit that is written exactly once and resumed."
    )

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names by which training asks for the rows; questions that stood in documents already are natural pairs."""
        return tuple(
            dict.fromkeys(
                "public" if one.family == "existing_questions" else "synthetic" for one in self.families
            )
        )

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
