from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel

from embedloom.encoder.attention import (
    PackedLayout,
    filler_tokens,
    group_lengths,
    packed_attention,
    use_packing,
)
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


def test_a_sliding_window_keeps_padded_batches():
    config = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    assert not use_packing(MistralModel(config), causal=False)


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
