"""The model as a worker trains it: the backbone as the config wants it, DeepSpeed's settings, and the engine built from them."""

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from embedloom.config.cluster import TrainingGroup
from embedloom.config.training import TrainingConfig, TrainingStage
from embedloom.core.memory import BUCKET_ELEMENTS, Shape, Trainer, training_memory
from embedloom.errors import ConfigError


def prepare_backbone(backbone: Any, config: TrainingConfig, stage: TrainingStage) -> None:
    """Training mode, adapters, frozen embeddings and recomputation as the config has them."""
    if config.lora is not None:
        from embedloom.training.lora import add_adapters  # peft takes a second to import

        add_adapters(backbone, config.lora)
    backbone.train()
    if config.freeze_token_embeddings:
        backbone.get_input_embeddings().requires_grad_(False)
    if layers := config.recomputed_layers(stage):
        backbone.gradient_checkpointing_enable(every_n_layers=layers)


def matrix_weights(backbone: Any) -> tuple[int, int]:
    """Weights that every token is multiplied with, all but the token embeddings, and how many of them are frozen."""
    embeddings = backbone.get_input_embeddings().weight
    own = [parameter for parameter in backbone.parameters() if parameter is not embeddings]
    return sum(p.numel() for p in own), sum(p.numel() for p in own if not p.requires_grad)


# How many tokens a forward pass may hold, where the config leaves it to the arithmetic.


CPU_TOKENS = 4096


def shape_of(backbone: Any) -> Shape:
    """What the arithmetic of memory needs of a backbone, before ZeRO-3 takes it apart."""
    config, embeddings = backbone.config, backbone.get_input_embeddings().weight
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_size
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    return Shape(
        weights,
        config.num_hidden_layers,
        config.hidden_size,
        keys,
        config.intermediate_size,
        embeddings.numel(),
    )


def trainer_of(
    config: TrainingConfig,
    stage: TrainingStage,
    group: TrainingGroup,
    backbone: Any,
    bf16_weights: bool,
    workers: int,
) -> Trainer:
    """How a worker of ``workers`` trains the backbone, as far as memory depends on it."""
    every = config.recomputed_layers(stage)
    return Trainer(
        workers,
        config.zero_stage,
        "bfloat16" if bf16_weights else "float32",
        group.gradient_dtype,
        recomputed_layers=math.ceil(backbone.config.num_hidden_layers / every) if every else 0,
        overlaps=config.zero_stage > 0,
        reduces_once=workers > 1 and group.reduces_each_step(config.zero_stage),
        trained_weights=sum(p.numel() for p in backbone.parameters() if p.requires_grad),
    )


def fitting_tokens(
    shape: Shape, trainer: Trainer, group_tokens: int, groups: int, device_bytes: float
) -> int:
    """Tokens of a forward pass that fit a GPU: a worker's whole share of a step if it can be, else what is left for it.

    Args:
        shape: of the model.
        trainer: how it is trained.
        group_tokens: most that a query with its documents may have, which is never cut in two.
        groups: queries of a step that fall to one worker.
        device_bytes: memory of the GPU.

    Raises:
        ConfigError: not even one query with its documents fits.
    """
    share = group_tokens * groups
    # One pass a step is reduced as it goes and holds no whole gradient.
    whole = training_memory(shape, replace(trainer, reduces_once=False), 0).largest_batch(device_bytes)
    if whole >= share:
        return share
    most = training_memory(shape, trainer, 0).largest_batch(device_bytes)
    if most < group_tokens:
        needed = training_memory(shape, trainer, group_tokens).total
        raise ConfigError(
            f"training.micro_batch_tokens: auto, but a query with its documents of {group_tokens:,} tokens takes "
            f"{needed / 1e9:.0f} GB of a GPU with {device_bytes / 1e9:.0f}; allowed: more workers, a higher zero_stage, "
            "gradient_checkpointing: true, or gradient_reduction: micro_batch in the cluster profile"
        )
    return most


def deepspeed_settings(config: TrainingConfig, group: TrainingGroup, bf16_weights: bool) -> dict[str, Any]:
    """The DeepSpeed config document.

    Gradients of bfloat16 weights are summed over micro-batches and reduced over workers in ``group.gradient_dtype``;
    DeepSpeed's own default is the weights' type, in which a sum of 64 workers' gradients has 8 bits.
    ``train_micro_batch_size_per_gpu`` is only DeepSpeed's bookkeeping here: our batches are cut by tokens and the
    loop says itself where an accumulation ends.

    Raises:
        ConfigError: bfloat16 weights without ZeRO, or sums over a step that ZeRO-3 cannot have in float32.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage > 0:
        # DeepSpeed's default below stage 3 is to wait for every reduction (its zero/config.py, overlap_comm_valid). Two
        # buckets are then filled in turn.
        zero |= {
            "overlap_comm": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        }
    if config.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    sums: dict[str, Any] = {}
    if bf16_weights and config.zero_stage == 0:
        raise ConfigError(
            "training.zero_stage: 0, but without ZeRO DeepSpeed keeps no float32 copy of bfloat16 weights and loses small "
            "steps; allowed: 1, 2, 3, or train.bf16_weights: false in the cluster profile"
        )
    if bf16_weights and group.gradient_dtype == "float32":
        if config.zero_stage == 3 and group.reduces_each_step(config.zero_stage):
            raise ConfigError(
                "training.gradient_reduction: step of the cluster profile, but with training.zero_stage 3 a worker can sum "
                "gradients of bfloat16 weights in bfloat16 only; allowed: micro_batch, or gradient_dtype: bfloat16"
            )
        sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return sums | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16_weights},
        # Our AdamW is torch's: no JIT compiler on the nodes, the same numbers on CPU and GPU.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms and biases; frozen weights and empty groups are left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "norm" in name.lower() else decayed).append(parameter)
    groups = [(decayed, weight_decay), (plain, 0.0)]
    return [{"params": own, "weight_decay": decay} for own, decay in groups if own]


def build_engine(module: nn.Module, config: TrainingConfig, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine with ``deepspeed_settings`` around ``module``, in the process group Ray Train has set up."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        # Only used by inference_all_reduce, but its JIT build (a compiler, ninja, a minute) would run at start-up.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        parameter_groups(module.named_parameters(), config.weight_decay),
        lr=0.0,
        betas=config.adam_betas,
        fused=True,
    )
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=settings,
        dist_init_required=False,
    )
    return engine


def unsharded_gradient_norm(engine: Any) -> float | None:
    """Norm of all gradients before clipping, where DeepSpeed keeps none (ZeRO-0 in float32); None elsewhere.

    To be asked after the last backward of a step and before the step, which clips.
    """
    if engine.zero_optimization():  # its optimizer has a norm from its first step on, and not before
        return None
    norms = [weight.grad.norm() for weight in engine.module.parameters() if weight.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
