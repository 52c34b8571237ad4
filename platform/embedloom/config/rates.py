"""``cluster/rates.yaml``: how fast devices are and what they cost, each number with its source."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from embedloom.config.base import FrozenConfig, read_yaml, validate

RATES_FILE = "rates.yaml"
WorkKind = Literal[
    "corpus",
    "corpus_whole",
    "gather",
    "encoder",
    "synthesize",
    "embed",
    "search",
    "prepare",
    "train",
    "examples",
    "merge",
    "evaluate",
    "gate",
]
Basis = Literal["measured", "published", "assumed"]
_BASIS: Any = Field(
    default="assumed",
    description=(
        "measured: by this program, on the device that is named. published: by somebody else. assumed: neither; it wants "
        "to be measured. `plan` says which figures rest on which."
    ),
)
Unit = Literal["rows", "tokens", "bytes", "flops", "scores"]


class Sourced(FrozenConfig):
    """A number and where it is from."""

    value: float = Field(gt=0, description="The number itself, in the unit that its key names.")
    source: str = Field(
        min_length=8,
        description="Where the number is from: a document, or the command that measured it, and when.",
    )
    basis: Basis = _BASIS


class ModelSize(Sourced):
    """How large the weights of a model are."""

    model: str = Field(description="Name of the model, as a run config has it.")


class Device(FrozenConfig):
    """One kind of GPU, or one CPU core."""

    accelerator: str | None = Field(
        default=None, description="As `accelerator` of a node pool names it. Null: a CPU core."
    )
    peak_bf16_tflops: Sourced | None = Field(
        default=None,
        description=(
            "Dense bfloat16 peak of the device, in TFLOP/s; MFU is counted against it. Null: unknown, so "
            "rates of the device cannot state an MFU."
        ),
    )
    peak_float32_tflops: Sourced | None = Field(
        default=None,
        description=(
            "Float32 peak without tensor cores, in TFLOP/s; what computes in float32 is counted against it. Null: unknown, "
            "so such work is not predicted."
        ),
    )
    memory_gb: Sourced | None = Field(
        default=None,
        description=(
            "Memory of the device, in GB of 10^9 bytes; `plan` refuses what cannot fit. Null: unknown, so memory is not "
            "checked."
        ),
    )
    bus_gb_per_second: Sourced | None = Field(
        default=None,
        description=(
            "Bus bandwidth of an all-reduce over several nodes, in GB/s, as nccl-tests counts it. Null: unknown, so the "
            "communication of training is not predicted."
        ),
    )
    node_bus_gb_per_second: Sourced | None = Field(
        default=None, description="The same between the devices of one node. Null: as over several nodes."
    )
    price_per_hour: Sourced | None = Field(
        default=None,
        description=(
            "Price of one device for an hour, in the file's currency. Null: unknown, so no costs are "
            "predicted."
        ),
    )


class ModelShape(FrozenConfig):
    """What FLOPs are counted from."""

    layers: int = Field(ge=1, description="Number of transformer layers of the model.")
    hidden_size: int = Field(
        ge=1, description="Width of the hidden states, from which the FLOPs of attention are counted."
    )
    layer_weights: int = Field(
        ge=1, description="Number of weights in the matrices of one layer, from which FLOPs are counted."
    )
    embedding_weights: int = Field(
        ge=0,
        description="Number of weights of the token embeddings, which are read by lookup and cost no FLOPs.",
    )
    key_size: int | None = Field(
        default=None,
        ge=1,
        description="Key heads times their width, for the memory of activations. Null: hidden_size, so too much.",
    )
    mlp_size: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Inner width of the MLP, for the memory of activations. Null: what layer_weights leave for a gated one."
        ),
    )
    source: str = Field(min_length=8, description="Where the numbers are from.")


def forward_flops(weights: int, layers: int, hidden_size: int, tokens: float, squared_tokens: float) -> float:
    """FLOPs of a forward: 2 a weight and token, and 4 l h n² of attention for a text of n tokens.

    Args:
        weights: of the matrices that every token goes through, so without the token embeddings.
        layers: of the model.
        hidden_size: of the model.
        tokens: of all texts.
        squared_tokens: sum of n² over texts.
    """
    return 2.0 * weights * tokens + 4.0 * layers * hidden_size * squared_tokens


class WorkRate(FrozenConfig):
    """How fast one device does one kind of work: by its MFU, or so many units a second."""

    work: WorkKind = Field(description="Kind of work that is timed.")
    device: str = Field(description="Name of an entry of `devices`.")
    base: str | None = Field(default=None, description="Only for this model. Null: for any.")
    mfu: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description=(
            "Share of the device's peak that the work reaches (model FLOPs utilisation, 0-1); needs "
            "peak_bf16_tflops. Null: see per_second."
        ),
    )
    per_second: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Units per second and device, instead of mfu. Null, with mfu null too: only start_seconds is "
            "known."
        ),
    )
    unit: Unit = Field(default="flops", description="What per_second counts.")
    start_seconds: float = Field(
        default=0.0, ge=0, description="Seconds before the first unit, however much work there is."
    )
    source: str = Field(
        min_length=8,
        description="Where the number is from: a document, or the command that measured it, and when.",
    )
    basis: Basis = _BASIS

    @model_validator(mode="after")
    def _says_how_fast(self) -> "WorkRate":
        if self.mfu is not None and self.per_second is not None:
            raise ValueError(f"rate of {self.work} on {self.device} has mfu and per_second; allowed: one")
        if self.mfu is not None and self.unit != "flops":
            raise ValueError(
                f"rate of {self.work} on {self.device}: mfu goes with unit flops, found {self.unit!r}"
            )
        if self.mfu is None and self.per_second is None and not self.start_seconds:
            raise ValueError(f"rate of {self.work} on {self.device} needs mfu, per_second or start_seconds")
        return self


class Published(FrozenConfig):
    """What somebody else's training took, to print beside the plan."""

    base: str = Field(description="Model that was trained.")
    device: str = Field(description="Name of an entry of `devices`.")
    gpus: int = Field(ge=1, description="GPUs that took part.")
    stage_hours: dict[str, float] = Field(min_length=1, description="Training stage -> hours it took.")
    source: str = Field(min_length=8, description="Where the hours are published.")


class RatesConfig(FrozenConfig):
    """The whole file."""

    version: Literal[1] = Field(description="Version of the file's form.")
    currency: str = Field(default="USD", description="Currency of all prices.")
    text_fill: Sourced = Field(
        description=(
            "Share of the token limits that texts fill where nothing has been measured (0-1); 1 makes "
            "every estimate an upper bound."
        )
    )
    devices: dict[str, Device] = Field(min_length=1, description="Device name -> its peak and price.")
    models: dict[str, ModelShape] = Field(
        default_factory=dict, description="Model name -> the shape that FLOPs are counted from."
    )
    weights_gb: tuple[ModelSize, ...] = Field(
        default=(),
        description="LLMs and the size of their weights as they are loaded, in GB; for the memory of engines.",
    )
    storage_gb_per_second: Sourced | None = Field(
        default=None,
        description="Speed at which a run's folder takes checkpoints, in GB/s. Null: unknown, so their time is not predicted.",
    )
    download_gb_per_second: Sourced | None = Field(
        default=None,
        description="Speed at which one node fetches models, in GB/s. Null: unknown, so fetching is not predicted.",
    )
    node_start_seconds: Sourced | None = Field(
        default=None,
        description=(
            "Seconds from asking for a node to Ray running on it: the machine, the image, the start. Null: unknown, so it is "
            "not predicted."
        ),
    )
    rates: tuple[WorkRate, ...] = Field(
        min_length=1, description="How fast each device does each kind of work."
    )
    published: tuple[Published, ...] = Field(
        default=(), description="What other people's trainings took, printed beside the plan."
    )

    @model_validator(mode="after")
    def _devices_are_there(self) -> "RatesConfig":
        for name in (*(rate.device for rate in self.rates), *(one.device for one in self.published)):
            if name not in self.devices:
                raise ValueError(f"unknown device {name!r}; allowed: {', '.join(sorted(self.devices))}")
        for rate in self.rates:
            if rate.mfu is not None and self.devices[rate.device].peak_bf16_tflops is None:
                raise ValueError(f"rate of {rate.work} has an mfu, but {rate.device} no peak_bf16_tflops")
        if self.text_fill.value > 1:
            raise ValueError(f"text_fill.value is {self.text_fill.value:g}; a share is at most 1")
        return self

    def device_of(self, accelerator: str | None) -> str | None:
        """Name of the device that a node pool's accelerator stands for; None where the file has none."""
        return next((name for name, one in self.devices.items() if one.accelerator == accelerator), None)

    def weights_of(self, model: str) -> float | None:
        """Size of a model's weights in GB; None where the file does not state it."""
        return next((one.value for one in self.weights_gb if one.model == model), None)

    def rate_of(self, work: str, device: str, base: str | None) -> WorkRate | None:
        """The rate of this model, else that of any model; None where nothing is known."""
        fitting = [rate for rate in self.rates if rate.work == work and rate.device == device]
        own = [rate for rate in fitting if rate.base == base and base is not None]
        return next(iter([*own, *(rate for rate in fitting if rate.base is None)]), None)


def load_rates(path: Path) -> RatesConfig:
    """Read and check a rates file.

    Raises:
        ConfigError: naming the file, the key, the value seen and what is allowed.
    """
    return validate(RatesConfig, read_yaml(path), str(path))
