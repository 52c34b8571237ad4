"""A student made of some of a teacher's layers computes what the teacher computes without the others."""

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import AutoConfig

from embedloom.config.encoder import EncoderConfig
from embedloom.encoder.model import Encoder
from embedloom.errors import ConfigError
from fakes_bases import make_base, prepare

TEXTS = ["a", "the colour red is number 1", "every layer that is left sees what the one before it made"]


@pytest.fixture(params=["Llama", "SmolLM3", "Gemma3Text", "Bert"])
def base(request, tmp_path):
    changes = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2} if request.param == "Gemma3Text" else {}
    )
    return make_base(tmp_path / "base", request.param, **changes)


def without(encoder, dropped):
    """The encoder with layers that hand on what they get."""
    (stack,) = (
        module
        for module in encoder.backbone.modules()
        if type(module).__name__ == "ModuleList" and len(module) == 4
    )
    for at in dropped:
        stack[at].forward = lambda hidden_states, *_, **__: hidden_states
    return encoder


def vectors(encoder):
    return encoder.embed(TEXTS, "document")


@pytest.mark.parametrize("layers", [(0, 3), (1, 2, 3)])
def test_vectors_are_those_of_the_base_without_the_other_layers(base, tmp_path, layers):
    whole = prepare(base, tmp_path / "whole", dtype="float32")
    cut = prepare(base, tmp_path / "cut", dtype="float32", layers=layers)
    dropped = set(range(4)) - set(layers)
    expected = vectors(without(Encoder.load(whole, dtype="float32"), dropped))
    found = Encoder.load(cut, dtype="float32")
    assert found.backbone.config.num_hidden_layers == len(layers)
    np.testing.assert_allclose(found.embed(TEXTS, "document"), expected, atol=1e-5)
    assert not np.allclose(
        found.embed(TEXTS, "document"), vectors(Encoder.load(whole, dtype="float32")), atol=1e-2
    )


def test_the_first_layers_by_list_are_those_by_number(tmp_path):
    base = make_base(tmp_path / "base", "Llama")
    by_list = prepare(base, tmp_path / "list", layers=(0, 1))
    by_number = prepare(base, tmp_path / "number", num_layers=2)
    assert (by_list / "model.safetensors").read_bytes() == (by_number / "model.safetensors").read_bytes()
    kinds = [AutoConfig.from_pretrained(folder).num_hidden_layers for folder in (by_list, by_number)]
    assert kinds == [2, 2]


def test_layers_that_are_not_there_are_refused(tmp_path):
    base = make_base(tmp_path / "base", "Llama")
    with pytest.raises(ConfigError, match=r"encoder.layers: 4 asked for, base has 4; allowed: 0 to 3"):
        prepare(base, tmp_path / "out", layers=(0, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 0]}, r"different and ascending, found \[1, 0\]"),
        ({"layers": [1, 1]}, r"different and ascending"),
        ({"layers": [0], "num_layers": 1}, r"layers is \[0\] and num_layers 1; allowed: one of them"),
        ({"layers": []}, r"at least 1 item"),
        ({"layers": [-1]}, r"greater than or equal to 0"),
    ],
)
def test_a_list_is_ascending_and_alone(changes, message):
    with pytest.raises(ValidationError, match=message):
        EncoderConfig(base="b", **changes)


def test_the_depth_is_what_is_kept():
    assert [EncoderConfig(base="b", **one).depth for one in ({}, {"num_layers": 3}, {"layers": (0, 5)})] == [
        None,
        3,
        2,
    ]
    assert "layers" not in EncoderConfig(base="b").model_dump()  # fingerprints stay
