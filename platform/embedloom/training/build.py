"""What a worker makes of its config before the first step."""

import math
from typing import Any

from embedloom.config.training import TrainingConfig, TrainingStage
from embedloom.config.training_data import TrainingSource
from embedloom.training.order import ExampleOrder, Share
from embedloom.training.store import ExampleStore


def prepare_backbone(backbone: Any, config: TrainingConfig) -> None:
    """Training mode, adapters, frozen embeddings and recomputation as the config has them."""
    if config.lora is not None:
        from embedloom.training.lora import add_adapters  # peft takes a second to import

        add_adapters(backbone, config.lora)
    backbone.train()
    if config.freeze_token_embeddings:
        backbone.get_input_embeddings().requires_grad_(False)
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable()


def matrix_weights(backbone: Any) -> tuple[int, int]:
    """Weights that every token is multiplied with, all but the token embeddings, and how many of them are frozen."""
    embeddings = backbone.get_input_embeddings().weight
    own = [parameter for parameter in backbone.parameters() if parameter is not embeddings]
    return sum(p.numel() for p in own), sum(p.numel() for p in own if not p.requires_grad)


def steps_of(stage: TrainingStage, order: ExampleOrder) -> int:
    """Optimizer steps of a stage."""
    return stage.max_steps or max(1, math.ceil(order.epoch_size * stage.epochs / stage.global_batch))


def shares_of(sources: tuple[TrainingSource, ...], store: ExampleStore) -> list[Share]:
    """The sources' parts of an epoch, with the rows they turned out to have."""
    return [Share(s.name, store.first_row(s.name), store.sizes[s.name], s.weight, s.cap) for s in sources]


def order_of(
    config: TrainingConfig,
    stage: TrainingStage,
    sources: tuple[TrainingSource, ...],
    store: ExampleStore,
    seed: int,
) -> ExampleOrder:
    """The order of a stage's examples; where a loss looks at the whole batch, no batch holds a row twice if it need not."""
    batch = None if config.loss == "infonce" else stage.global_batch
    return ExampleOrder(shares_of(sources, store), seed, batch)
