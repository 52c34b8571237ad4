"""How large micro-batches are where the config leaves it to the arithmetic, for Llama-3.1-8B on 64 GPUs by hand."""

from dataclasses import replace

import pytest

from embedloom.config.cluster import TrainingGroup
from embedloom.core.memory import Shape, Trainer
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError
from embedloom.training.model import fitting_tokens, shape_of, trainer_of
from fakes_training import training_config

GB = 1e9
LLAMA_8B = Shape.of_layers(32, 4096, 218_103_808, 525_336_576, key_size=1024, mlp_size=14336)
PAPER = Trainer(64, 2, recomputed_layers=32, overlaps=True, reduces_once=True)
GROUP = 3 * 512


def test_a_worker_takes_its_whole_share_of_a_step_at_once_where_it_fits():
    # 2,048 queries of 3 texts over 64 workers: 49,152 tokens, 15 GB of weights and 31 of activations (0.62 MB a token).
    assert fitting_tokens(LLAMA_8B, PAPER, GROUP, 32, 85 * GB) == 49_152


def test_several_passes_leave_room_for_a_whole_gradient():
    # It takes 30 GB in float32. Of 0.9 x 85 GB, 15.0 + 1.4 + 30.0 + 1.1 + 4.0 + 1.0 + 3.0 are fixed: 20.9 are left.
    found = fitting_tokens(LLAMA_8B, PAPER, GROUP, 100, 85 * GB)
    assert found == pytest.approx(20.9 * GB / 0.62e6, rel=0.05)
    often = fitting_tokens(LLAMA_8B, replace(PAPER, reduces_once=False), GROUP, 100, 85 * GB)
    assert often == pytest.approx((20.9 + 29.5) * GB / 0.62e6, rel=0.05)


def test_what_cannot_fit_is_refused_with_the_numbers():
    with pytest.raises(
        ConfigError, match=r"1,536 tokens takes \d+ GB of a GPU with 24; allowed: more workers"
    ):
        fitting_tokens(LLAMA_8B, PAPER, GROUP, 32, 24 * GB)


def test_shape_and_trainer_are_those_of_the_model_and_the_config(tiny_model):
    backbone = Encoder.load(tiny_model, dtype="float32", trainable=True).backbone
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    assert shape_of(backbone) == Shape(weights, 2, 32, 16, 64, 259 * 32)
    config = training_config(gradient_checkpointing=2, zero_stage=2)
    group = TrainingGroup(workers=2, gradient_dtype="bfloat16")
    assert trainer_of(config, config.stages[0], group, backbone, True, 2) == Trainer(
        2,
        2,
        "bfloat16",
        "bfloat16",
        recomputed_layers=1,
        overlaps=True,
        reduces_once=True,
        trained_weights=weights,
    )
    plain = training_config(zero_stage=0)
    assert trainer_of(plain, plain.stages[0], group, backbone, False, 1) == Trainer(
        1, 0, "float32", "bfloat16", recomputed_layers=0, trained_weights=weights
    )
