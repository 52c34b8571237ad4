"""An int8 endpoint stands behind a gate of its own: what it loses on held-out queries."""

import json
import re
import shutil

import pytest

from embedloom.config.base import validate
from embedloom.config.serving import ApplicationArgs, ServingConfig
from embedloom.core.model_folder import ModelFolder
from embedloom.core.verdict import GATE_FILE, INT8_FILE, int8_verdict
from embedloom.errors import ConfigError, DataError


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def store(folder, float32, int8, **changes):
    content = int8_verdict(ModelFolder(folder).weights, float32, int8, 271) | changes
    (folder / INT8_FILE).write_text(json.dumps(content))
    return content


@pytest.mark.parametrize(
    ("int8", "verdict"), [(0.4200, "passed"), (0.4151, "passed"), (0.4149, "refused"), (0.5, "passed")]
)
def test_at_most_five_thousandths_may_be_lost(folder, int8, verdict):
    content = int8_verdict(ModelFolder(folder).weights, 0.42, int8, 271)
    assert content["verdict"] == verdict
    assert content["lost"] == pytest.approx(0.42 - int8)


def test_a_refusal_tells_the_figures(folder):
    store(folder, 0.42, 0.4001)
    with pytest.raises(DataError) as refused:
        ModelFolder(folder).check_int8()
    for figure in ("0.0199", "0.4200", "0.4001", "0.005", "271"):
        assert figure in str(refused.value)


def test_a_verdict_on_other_weights_counts_as_none(folder):
    store(folder, 0.42, 0.42)
    ModelFolder(folder).check_int8()
    store(folder, 0.42, 0.42, weights="0" * 16)
    assert ModelFolder(folder).int8_verdict is None
    with pytest.raises(DataError, match=re.escape("no int8.json")):
        ModelFolder(folder).check_int8()


def test_a_broken_verdict_is_named(folder):
    (folder / INT8_FILE).write_text('{"verdict": "perhaps"}')
    with pytest.raises(DataError, match=r"int8\.json: not a verdict on int8"):
        ModelFolder(folder).check_int8()


def arguments(folder, **serving):
    return ApplicationArgs(
        model_folder=str(folder), model_id="x", served_name="tiny",
        serving=ServingConfig(model=str(folder), compute_dtype="int8", **serving),
    )  # fmt: skip


def test_a_gated_endpoint_wants_the_verdict_and_another_does_not(folder):
    from embedloom.serving.app import build_application

    gate = {"verdict": "passed", "weights": ModelFolder(folder).weights}
    (folder / GATE_FILE).write_text(json.dumps(gate))
    with pytest.raises(DataError, match=r"no int8\.json"):
        build_application(arguments(folder))
    store(folder, 0.42, 0.30)
    with pytest.raises(DataError, match=r"loses 0\.1200 nDCG@10"):
        build_application(arguments(folder))
    build_application(arguments(folder, require_gate=False))
    store(folder, 0.42, 0.42)
    build_application(arguments(folder))


def test_only_our_own_engine_on_cpu_has_it(folder):
    from embedloom.serving.app import build_application

    with pytest.raises(ConfigError, match="int8"):
        validate(ServingConfig, {"compute_dtype": "int8", "engine": "vllm"}, "serving")
    args = arguments(folder, require_gate=False)
    gpus = args.model_copy(update={"scaling": args.scaling.model_copy(update={"gpus": 1.0})})
    with pytest.raises(ConfigError, match="for CPUs"):
        build_application(gpus)
