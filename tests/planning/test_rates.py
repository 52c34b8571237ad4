"""The rates file: closed, every number sourced, the right rate chosen."""

from pathlib import Path

import pytest
import yaml

from embedloom.config.rates import load_rates
from embedloom.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "cluster" / "rates.yaml"


@pytest.fixture
def changed(tmp_path):
    def write(change):
        content = yaml.safe_load(SHIPPED.read_text())
        change(content)
        path = tmp_path / "rates.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_matrix_weights_of_the_8b_model_are_those_the_model_card_counts():
    # 7,504,924,672 parameters, of which 525,336,576 embeddings; 65 norms of 4,096 are no matrices.
    shape = load_rates(SHIPPED).models["meta-llama/Llama-3.1-8B"]
    assert shape.layers * shape.layer_weights == 7_504_924_672 - 525_336_576 - 65 * 4096


def test_the_mfu_of_training_is_an_assumption_and_not_the_papers_hours_turned_round():
    # By hand, every text 512 tokens: 6 FLOPs a weight and token, 12 l h n² of attention; docs/how-to/plan-cost.md says 40 %.
    weights, layers, hidden, tokens = 6_979_321_856, 32, 4096, 512
    text = 6 * weights * tokens + 12 * layers * hidden * tokens**2
    texts = 5_773 * 2_048 * 3 + 33_668 * 128 * 6
    implied = texts * text / (64 * 46.5 * 3600 * 312e12)
    assert implied == pytest.approx(0.40, abs=0.005)
    rate = load_rates(SHIPPED).rate_of("train", "a100-80gb", "meta-llama/Llama-3.1-8B")
    assert rate.basis == "assumed"
    assert abs(rate.mfu - implied) > 0.02


def test_no_figure_of_a_gpu_is_called_measured():
    rates = load_rates(SHIPPED)
    assert {rate.basis for rate in rates.rates if rate.device != "cpu-core"} == {"assumed", "published"}
    assert {rate.basis for rate in rates.rates if rate.device == "cpu-core"} == {"measured"}


def test_a_models_own_rate_goes_before_any_models(changed):
    own = {
        "work": "embed",
        "device": "cpu-core",
        "base": "minilm-l6",
        "per_second": 7.0,
        "source": "made up here",
    }
    rates = load_rates(changed(lambda content: content["rates"].append(own)))
    assert rates.rate_of("embed", "cpu-core", "minilm-l6").per_second == 7.0
    assert rates.rate_of("embed", "cpu-core", "another").per_second == 1.3e11
    assert rates.rate_of("train", "cpu-core", "another") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["devices"]["a100-80gb"].update(pric={}), "nearest valid key is 'price_per_hour'"),
        (
            lambda c: c["devices"]["a100-80gb"]["price_per_hour"].pop("source"),
            r"price_per_hour\.source: required",
        ),
        (lambda c: c["rates"][0].update(device="b200"), "unknown device 'b200'; allowed: a100-80gb"),
        (lambda c: c["rates"][0].update(per_second=5.0), "has mfu and per_second; allowed: one"),
        (lambda c: c["rates"][0].update(device="cpu-core"), "has an mfu, but cpu-core no peak_bf16_tflops"),
        (lambda c: c["text_fill"].update(value=1.5), "a share is at most 1"),
    ],
)
def test_what_does_not_fit_is_named(changed, change, message):
    with pytest.raises(ConfigError, match=message):
        load_rates(changed(change))
