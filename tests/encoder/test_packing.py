import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from embedloom.encoder import attention
from embedloom.encoder.attention import (
    PackedLayout,
    filler_tokens,
    group_lengths,
    load_kernel,
    packed_attention,
    use_packing,
)
from embedloom.encoder.backbone import first_position
from embedloom.encoder.model import pool_packed
from embedloom.errors import ConfigError, DataError

TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8, 9], [9, 8, 7], [2, 3, 4], [6]]


def llama(causal: bool = False) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    config.is_causal = causal
    return LlamaModel(config).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, attn_implementation="sdpa",
    )  # fmt: skip
    return BertModel(config).eval()


def one_by_one(model: torch.nn.Module) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in TEXTS]


def in_one_row(model: torch.nn.Module, causal: bool) -> list[torch.Tensor]:
    layout = PackedLayout([len(text) for text in TEXTS], causal, torch.device("cpu"))
    row = torch.tensor([[token for text in TEXTS for token in text]])
    hidden = model(input_ids=row, position_ids=layout.positions, packed=layout).last_hidden_state[0]
    return list(hidden.split([len(text) for text in TEXTS]))


@pytest.mark.parametrize(
    ("build", "causal"),
    [(llama, False), (lambda: llama(True), True), (bert, False)],
    ids=["bi", "causal", "bert"],
)
def test_a_packed_text_has_the_states_it_has_alone(build, causal):
    model = build()
    with torch.no_grad():
        expected = one_by_one(model)
        assert use_packing(model, causal)
        packed = in_one_row(model, causal)
    for own, alone in zip(packed, expected, strict=True):
        torch.testing.assert_close(own, alone, atol=2e-6, rtol=1e-5)


def test_gradients_are_those_of_texts_run_one_by_one():
    model = llama()
    sum((states**2).sum() for states in one_by_one(model)).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    assert use_packing(model, causal=False)
    sum((states**2).sum() for states in in_one_row(model, causal=False)).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-5, rtol=1e-4)


def test_a_model_whose_probe_differs_keeps_padded_batches():
    # The contract says causal, the model attends both ways.
    model = llama(causal=False)
    assert not use_packing(model, causal=True)
    assert model.config._attn_implementation == "sdpa"


LONG = [[(place * 7 + length) % 29 + 3 for place in range(length)] for length in (40, 23, 23, 9, 8, 3, 1)]
COMMON = dict(
    vocab_size=40, hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.3,
    max_position_embeddings=64, pad_token_id=1,
)  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
WINDOWED = {
    **GROUPED,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Each with something that packing must keep: positions that begin at 2, windows on some layers or on all, capped scores.
FAMILIES = [
    ("XLMRoberta", {}, False), ("Roberta", {}, False), ("Camembert", {}, False),
    ("ModernBert", {"local_attention": 12, "global_attn_every_n_layers": 2}, False),
    ("Mistral", {**GROUPED, "sliding_window": 8}, True), ("Ministral3", {**GROUPED, "sliding_window": 8}, True),
    ("Gemma2", {**WINDOWED, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"}, True),
    ("Gemma2", {**WINDOWED, "attn_logit_softcapping": 2.0, "attn_implementation": "eager", "sliding_window": 64}, False),
    ("Gemma3Text", {**WINDOWED}, True), ("Gemma3Text", {**WINDOWED, "use_bidirectional_attention": True}, False),
    ("Qwen3", {**WINDOWED, "use_sliding_window": True}, True),
]  # fmt: skip


def of_family(family: str, causal: bool, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, "attn_implementation": "sdpa", **changes})
    config.use_cache = False
    if family != "Gemma3Text":  # which has a switch of its own
        config.is_causal = causal
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize("lanes", [0, 4, 16], ids=["sdpa", "narrow", "compiled"])
@pytest.mark.parametrize(
    ("family", "changes", "causal"), FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_other_families_give_each_text_the_states_it_has_alone(family, changes, causal, lanes, monkeypatch):
    kernel = load_kernel()
    if not lanes:
        monkeypatch.setattr(attention, "load_kernel", lambda: None)
    elif kernel is None:
        pytest.skip("no compiled attention on this CPU")
    else:
        kernel.lanes(lanes)
    model = of_family(family, causal, **changes)
    try:
        with torch.no_grad():
            expected = [model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in LONG]
            assert use_packing(model, causal)
            layout = PackedLayout(list(map(len, LONG)), causal, torch.device("cpu"), first_position(model))
            row = torch.tensor([[token for text in LONG for token in text]])
            hidden = model(input_ids=row, position_ids=layout.positions, packed=layout).last_hidden_state[0]
    finally:
        if kernel is not None:
            kernel.lanes(16)
    for own, alone in zip(hidden.split(layout.lengths), expected, strict=True):
        torch.testing.assert_close(own, alone, atol=2e-5, rtol=1e-4)


def test_gradients_through_windows_and_caps_are_those_of_texts_run_one_by_one():
    model = of_family("Gemma2", True, **FAMILIES[6][1])
    sum((model(input_ids=torch.tensor([text])).last_hidden_state ** 2).sum() for text in LONG).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    assert use_packing(model, causal=True)
    layout = PackedLayout(list(map(len, LONG)), True, torch.device("cpu"))
    row = torch.tensor([[token for text in LONG for token in text]])
    (
        model(input_ids=row, position_ids=layout.positions, packed=layout).last_hidden_state ** 2
    ).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-4, rtol=1e-3)


def test_the_probe_sees_past_a_window_that_is_computed_otherwise():
    """Windows that packing would get wrong are found, as one of the probe's texts is longer than they are."""
    model = of_family("Mistral", True, **GROUPED, sliding_window=8)
    for layer in model.layers:
        layer.self_attn.config = copy.copy(model.config)
        layer.self_attn.config.sliding_window = 4
    assert not use_packing(model, causal=True)


def test_a_family_that_adds_to_its_scores_keeps_padded_batches():
    assert not use_packing(of_family("MPNet", False, attn_implementation="eager"), causal=False)


def test_attention_without_a_layout_is_an_error_not_a_leak():
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(DataError, match="without a layout"):
        packed_attention(None, states, states, states, None)


def test_groups_hold_every_token_and_one_length_unless_texts_are_short_and_few():
    groups = group_lengths([100, 90, 90, 70, 20, 18, 15, 12, 9, 1])
    assert [group.lengths for group in groups] == [(100,), (90, 90), (70,), (20, 18, 15), (12, 9), (1,)]
    assert [(group.start, group.stop) for group in groups] == [
        (0, 100), (100, 280), (280, 350), (350, 403), (403, 424), (424, 425),
    ]  # fmt: skip
    assert [group.even for group in groups] == [True, True, True, False, False, True]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", [[2, 3], [7, 7]]), ("cls", [[1, 1], [7, 7]]), ("last_token", [[3, 5], [7, 7]])],
)
def test_pooling_keeps_texts_apart(pooling, expected):
    hidden = torch.tensor([[1.0, 1.0], [3.0, 5.0], [7.0, 7.0]])
    assert pool_packed(hidden, torch.tensor([0, 2, 3]), pooling).tolist() == expected


def test_unknown_pooling_lists_the_allowed():
    with pytest.raises(
        ConfigError, match=r"'cls\+attention' is unknown; allowed: mean, cls, last_token, max"
    ):
        pool_packed(torch.zeros(1, 1), torch.tensor([0, 1]), "cls+attention")


def test_an_encoder_gives_the_same_vectors_in_any_batch(tiny_model: Path):
    from embedloom.encoder.model import Encoder

    encoder = Encoder.load(tiny_model, dtype="float32", device="cpu")
    assert encoder.packed
    texts = ["a", "a much longer text than the first", "b c", "", "a"] * 9
    together = torch.from_numpy(encoder.embed(texts, "document"))
    real, padded = encoder.tokens.real, encoder.tokens.padded
    assert real < padded <= real * 33 / 32  # the row has filler, which must not be seen
    alone = torch.cat([torch.from_numpy(encoder.embed([text], "document")) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_the_probe_leaves_training_mode_on():
    model = llama()
    model.train()
    assert use_packing(model, causal=False)
    assert model.training


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_states_stay_near_those_of_float32(causal: bool):
    model = llama(causal)
    with torch.no_grad():
        expected = one_by_one(model)
        assert use_packing(model, causal)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            packed = in_one_row(model, causal)
    for own, alone in zip(packed, expected, strict=True):
        cosine = torch.nn.functional.cosine_similarity(own.float(), alone, dim=-1)
        assert cosine.min() > 0.999


def test_rows_of_a_doubling_have_few_lengths_and_little_filler():
    filled = {tokens: tokens + filler_tokens(tokens) for tokens in range(1, 8193)}
    assert all(tokens <= total <= tokens * 33 / 32 for tokens, total in filled.items())
    for first in (64, 512, 4096):
        assert len({filled[tokens] for tokens in range(first, 2 * first)}) <= 33
    assert filled[20] == 20  # a short query is not made longer
