"""Memory of a GPU, against numbers worked out by hand for Llama-3.1-8B (7.505 billion weights)."""

import pytest

from embedloom.core.memory import (
    Shape,
    Trainer,
    engine_memory,
    inference_memory,
    search_memory,
    training_memory,
    training_remedy,
)

GB = 1e9
A100 = H100 = 85 * GB  # 79.2 GiB
LLAMA_8B = Shape.of_layers(32, 4096, 218_103_808, 525_336_576, key_size=1024, mlp_size=14336)
PAPER = Trainer(64, 2, gradient_dtype="bfloat16", recomputed_layers=None, overlaps=True)


def test_the_shape_has_the_weights_that_the_model_card_counts():
    assert LLAMA_8B.weights == 7_504_924_672


def test_zero_2_on_64_gpus_part_by_part():
    fixed = {name: size / GB for name, size in training_memory(LLAMA_8B, PAPER, 0).fixed.items()}
    assert fixed == pytest.approx(
        {
            "weights": 15.01,  # 2 bytes
            "optimizer": 1.407,  # (4 + 4 + 4) / 64
            "gradients": 0.2345,  # 2 / 64
            "largest gradient": 1.051,  # 525,336,576 embeddings
            "buckets": 2.0,  # two of 5e8
            "gathered weights": 1.0,
            "CUDA and NCCL": 3.0,
        },
        rel=1e-3,
    )


@pytest.mark.parametrize(("tokens", "by_hand"), [(16_384, 34), (49_152, 54)])
def test_with_every_layer_computed_again_the_paper_run_fits_an_80_gb_gpu(tokens, by_hand):
    # 32 x 8 KiB a token kept, and 0.36 MB for the layer at work and the last norm.
    memory = training_memory(LLAMA_8B, PAPER, tokens)
    assert memory.total / GB == pytest.approx(by_hand, abs=1)
    assert memory.fits(A100)


def test_without_recomputation_a_token_takes_seven_megabytes():
    kept = Trainer(64, 2, gradient_dtype="bfloat16", recomputed_layers=0, overlaps=True)
    memory = training_memory(LLAMA_8B, kept, 6_144)
    assert memory.per_token / 1e6 == pytest.approx(7.0, abs=0.2)
    assert memory.total / GB == pytest.approx(22.65 + 1.05 + 6_144 * 7.156e-3, rel=1e-3)


def test_half_the_layers_computed_again_lies_between():
    def per_token(layers):
        return training_memory(LLAMA_8B, Trainer(64, 2, recomputed_layers=layers), 0).per_token

    all_but = (219_136 - 8_192) * 16  # bytes a token that 16 layers more keep
    assert per_token(16) - per_token(32) == all_but
    assert per_token(None) == per_token(32)


@pytest.mark.parametrize(("gradients", "bytes_a_weight"), [("bfloat16", 16), ("float32", 18)])
def test_one_gpu_holds_every_byte_of_a_weight(gradients, bytes_a_weight):
    alone = Trainer(1, 2, gradient_dtype=gradients, recomputed_layers=None)
    fixed = training_memory(LLAMA_8B, alone, 0).fixed
    states = fixed["weights"] + fixed["optimizer"] + fixed["gradients"]
    assert states == LLAMA_8B.weights * bytes_a_weight
    assert not training_memory(LLAMA_8B, alone, 512).fits(H100)


def test_float32_gradients_cost_what_they_say():
    in_float = Trainer(64, 2, gradient_dtype="float32", recomputed_layers=None, overlaps=True)
    more = training_memory(LLAMA_8B, in_float, 0).total - training_memory(LLAMA_8B, PAPER, 0).total
    assert more == pytest.approx(7_504_924_672 * 2 / 64 + 2 * 5e8 * 2)


def test_zero_1_and_one_reduction_a_step_hold_whole_gradients():
    first = Trainer(64, 1, gradient_dtype="bfloat16", recomputed_layers=None, overlaps=True)
    once = Trainer(64, 2, gradient_dtype="bfloat16", recomputed_layers=None, overlaps=True, reduces_once=True)
    for trainer in (first, once):
        assert training_memory(LLAMA_8B, trainer, 0).fixed["gradients"] == LLAMA_8B.weights * 2


def test_zero_3_spreads_the_weights():
    third = Trainer(64, 3, gradient_dtype="bfloat16", recomputed_layers=None)
    fixed = training_memory(LLAMA_8B, third, 0).fixed
    assert fixed["weights"] / GB == pytest.approx(0.2345, rel=1e-3)
    assert fixed["gathered weights"] == 1.05e9 * 2


def test_float32_weights_without_zero_take_sixteen_bytes_and_their_cast():
    fixed = training_memory(LLAMA_8B, Trainer(1, 0, weight_dtype="float32"), 0).fixed
    assert fixed["weights"] + fixed["optimizer"] + fixed["gradients"] == LLAMA_8B.weights * 16
    assert fixed["cast weights"] == LLAMA_8B.weights * 2
    with pytest.raises(ValueError, match="bfloat16 weights need zero_stage 1, 2 or 3"):
        training_memory(LLAMA_8B, Trainer(1, 0), 0)


def test_adapters_have_states_of_their_own_weights_only():
    fixed = training_memory(LLAMA_8B, Trainer(1, 2, trained_weights=10_000_000), 0).fixed
    assert fixed["optimizer"] == 12 * 10_000_000
    assert fixed["gradients"] == 4 * 10_000_000
    assert fixed["weights"] == LLAMA_8B.weights * 2


def test_what_fits_instead_of_one_gpu_is_more_of_them():
    alone = Trainer(1, 2, recomputed_layers=0)
    found = training_remedy(LLAMA_8B, alone, 16_384, 1_536, H100)
    # Float32 gradients. Two GPUs: 15.0 + 45.0 + 15.0 are the 75 of 76.5 without any buffer, and ZeRO-3 takes 7.5 off
    # for 2.1 of gathered weights. Four: 15.0 + 22.5 + 7.5 + 7.1 of buffers and context leave 24.4.
    assert (found.trainer.workers, found.trainer.zero_stage) == (4, 2)
    assert found.trainer.recomputed_layers is None
    assert found.tokens == 16_384
    assert found.memory.total / GB == pytest.approx(52.1 + 10.2, abs=0.1)


def test_recomputation_is_proposed_before_more_gpus():
    kept = Trainer(64, 2, gradient_dtype="bfloat16", recomputed_layers=0)
    found = training_remedy(LLAMA_8B, kept, 49_152, 49_152, A100)
    assert (found.trainer.workers, found.trainer.zero_stage, found.trainer.recomputed_layers) == (64, 2, None)
    assert found.tokens == 49_152


def test_nothing_is_proposed_where_one_query_is_too_long():
    assert training_remedy(LLAMA_8B, PAPER, 10**7, 10**7, A100) is None


def test_embedding_in_bfloat16_takes_half_of_float32():
    half = inference_memory(LLAMA_8B, "bfloat16", 65_536)
    assert half.fixed["weights"] / GB == pytest.approx(15.01, rel=1e-3)
    # 2 x (5 x 4096 + 2 x 1024 + 3 x 14336) + 4 x 4096 bytes a token.
    assert half.per_token == 147_456
    assert inference_memory(LLAMA_8B, "float32", 1).fixed["weights"] == 2 * half.fixed["weights"]
    assert inference_memory(LLAMA_8B, "bfloat16", 1, copies=2).total == pytest.approx(
        2 * inference_memory(LLAMA_8B, "bfloat16", 1).total
    )


def test_a_share_of_the_documents_on_one_gpu():
    memory = search_memory(6_800_000 / 64, 4096, "float32", 2_048, 131_072)
    assert memory.fixed["vectors"] == 106_250 * 4096 * 4
    assert memory.total / GB == pytest.approx(1.741 + 1.741 + 1.741 + 1.0, rel=1e-2)


def test_an_engine_needs_its_part_of_the_weights_and_room_for_requests():
    # Mixtral-8x22B, 141 billion weights in bfloat16: 282 GB over eight GPUs fit, over four 70.5 + 2 + 4.25 + 1 do not.
    assert engine_memory(282 * GB, 8, A100).fits(A100, 0.9)
    assert engine_memory(282 * GB, 4, A100).total == pytest.approx(77.75 * GB)
    assert not engine_memory(282 * GB, 4, A100).fits(A100, 0.9)
    assert engine_memory(282 * GB, 4, A100).fits(A100, 0.95)
