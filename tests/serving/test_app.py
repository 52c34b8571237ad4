import json
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from embedloom.config.cluster import ServeScaling
from embedloom.config.serving import ApplicationArgs, ModelAlias, ServingConfig
from embedloom.core.model_folder import ModelFolder
from embedloom.errors import ConfigError, DataError
from embedloom.serving.app import build, build_application, build_encoders
from embedloom.serving.service import BatchSettings
from embedloom.serving.stage import check_port_free

ROOT = Path(__file__).parents[2]
UNGATED = ServingConfig(require_gate=False)


def names_of(application) -> list[str]:
    """Deployment names of an application, ingress first."""
    bound = application._bound_deployment
    inner = [item._bound_deployment.name for item in bound.init_args if hasattr(item, "_bound_deployment")]
    return [bound.name, *inner]


def test_unknown_argument_names_the_nearest():
    with pytest.raises(ConfigError, match="nearest valid key is 'model_folder'"):
        build({"model_foldr": "x", "served_name": "t"})
    with pytest.raises(
        ConfigError, match=r"serving\.max_itms: unknown key; the nearest valid key is 'max_items'"
    ):
        build({"model_folder": "x", "served_name": "t", "serving": {"max_itms": 4}})


def test_model_folder_must_hold_a_model(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        build({"model_folder": str(tmp_path), "served_name": "t"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no weights"):
        build({"model_folder": str(tmp_path), "served_name": "t"})


def test_broken_contract_is_found_before_anything_starts(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    contract = json.loads((folder / "contract.json").read_text())
    (folder / "contract.json").write_text(json.dumps({**contract, "max_query_tokens": 96}))
    with pytest.raises(DataError, match=r"contract\.json: hash is"):
        build({"model_folder": str(folder), "served_name": "t"})


def test_only_weights_that_passed_the_gate_are_served_unless_told_otherwise(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)

    def serve(**serving):
        return build({"model_folder": str(folder), "served_name": "t", "serving": serving})

    def verdict(outcome, weights):
        content = {"verdict": outcome, "weights": weights, "reasons": ["sts -0.1"]}
        (folder / "gate.json").write_text(json.dumps(content))

    with pytest.raises(DataError, match=r"has not passed the gate .*serving\.require_gate: false"):
        serve()
    assert names_of(serve(require_gate=False)) == ["endpoint"]
    weights = ModelFolder(folder).weights
    verdict("refused", weights)
    with pytest.raises(DataError, match=r"refused this model \(sts -0\.1\)"):
        serve()
    verdict("passed", weights)
    assert names_of(serve()) == ["endpoint"]
    verdict("maybe", weights)
    with pytest.raises(DataError, match="not a verdict of the gate"):
        serve()
    verdict("passed", weights)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=f"is about weights {weights}, these are"):
        serve()


def test_one_replica_answers_http_itself_and_several_stand_behind_a_gateway(tiny_model):
    def of(**scaling):
        args = ApplicationArgs(
            model_folder=str(tiny_model), served_name="t", serving=UNGATED, scaling=ServeScaling(**scaling)
        )
        return names_of(build_application(args))

    assert of() == ["endpoint"]
    assert of(min_replicas=2, max_replicas=2) == ["gateway", "encoder"]
    assert of(min_replicas=0, max_replicas=1) == ["gateway", "encoder"]


def test_limits_reach_the_deployments(tiny_model):
    serving = ServingConfig(
        require_gate=False, max_ongoing_requests=8, max_queued_requests=20, max_batch_tokens=128
    )
    scaling = ServeScaling(min_replicas=1, max_replicas=3, target_ongoing_requests=4, cpus=2, gpus=0.5)
    application = build_application(
        ApplicationArgs(model_folder=str(tiny_model), served_name="t", serving=serving, scaling=scaling)
    )
    gateway = application._bound_deployment
    encoder = gateway.init_args[0]._bound_deployment
    assert gateway.init_args[1].max_requests == 3 * 8 + 20
    assert encoder.max_ongoing_requests == 8
    assert BatchSettings(**encoder.user_config) == BatchSettings.of(serving)
    assert encoder.user_config["max_batch_tokens"] == 128
    assert encoder.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5}
    assert encoder._deployment_config.autoscaling_config.max_replicas == 3


def test_what_clients_are_told_by_the_config_reaches_the_endpoint(tiny_model):
    serving = {"require_gate": False, "models": {"t-query": {"side": "query"}}, "truncate": "end"}
    endpoint = build(
        {"model_folder": str(tiny_model), "served_name": "t", "serving": serving}
    )._bound_deployment
    settings = endpoint.init_args[1]
    assert settings.models == {"t-query": ModelAlias(side="query")}
    assert (settings.truncate, settings.token_ids) == ("end", "refuse")
    for models, words in (
        ({"t": {}}, r"serving\.models\.t: is the served name"),
        ({"q": {"task": "searching"}}, r"serving\.models\.q\.task: .*searching"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(
                {
                    "model_folder": str(tiny_model),
                    "served_name": "t",
                    "serving": {**serving, "models": models},
                }
            )


def test_scaling_target_must_be_reachable(tiny_model):
    scaling = {"max_replicas": 2, "target_ongoing_requests": 65}
    with pytest.raises(ConfigError, match="would never scale up"):
        build({"model_folder": str(tiny_model), "served_name": "t", "scaling": scaling})


def test_shipped_config_matches_the_arguments():
    (application,) = yaml.safe_load((ROOT / "serve/config.yaml").read_text())["applications"]
    assert application["import_path"] == "serve.app:build"
    ApplicationArgs.model_validate(application["args"])


def test_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"serving\.port: {port} is in use on 127\.0\.0\.1; choose a free port"
        ):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", port)


def test_host_that_is_not_ours_is_named():
    with pytest.raises(ConfigError, match=r"serving\.host: cannot listen on '192\.0\.2\.1'"):
        check_port_free("192.0.2.1", 8000)


@pytest.mark.parametrize(
    ("scaling", "serving", "shared"),
    [
        ({"min_replicas": 0, "max_replicas": 3}, {}, True),
        ({"min_replicas": 0, "max_replicas": 1}, {}, False),  # nobody to share with
        ({"min_replicas": 2, "max_replicas": 2, "gpus": 0.5}, {}, True),  # one reading for both devices
        ({"min_replicas": 2, "max_replicas": 2}, {"engine": "vllm"}, False),
    ],
)
def test_several_replicas_share_their_weights(tiny_model, scaling, serving, shared):
    args = ApplicationArgs(
        model_folder=str(tiny_model),
        served_name="t",
        serving=ServingConfig(require_gate=False, **serving),
        scaling=ServeScaling(**scaling),
    )
    encoders = build_encoders(args)._bound_deployment
    actors = encoders._deployment_config.deployment_actors or []
    assert [actor.name for actor in actors] == (["weights"] if shared else [])
    assert encoders.init_args[0].shared == shared


def test_streams_are_of_the_torch_engine_alone(tiny_model):
    def serve(streams):
        scaling = ServeScaling(threads=2, streams=streams)
        serving = ServingConfig(require_gate=False, engine="vllm")
        return build_application(
            ApplicationArgs(model_folder=str(tiny_model), served_name="t", serving=serving, scaling=scaling)
        )

    with pytest.raises(ConfigError, match=r"serve\.streams: 2 with serving\.engine 'vllm'"):
        serve(2)
    serve(None)


@pytest.mark.parametrize(
    ("gpus", "stated", "computed"),
    [(0.0, "auto", "float32"), (0.5, "auto", "bfloat16"), (1.0, "float32", "float32"), (0.0, "int8", "int8")],
)
def test_replicas_with_gpus_compute_in_bfloat16_and_the_endpoint_says_so(tiny_model, gpus, stated, computed):
    args = ApplicationArgs(
        model_folder=str(tiny_model),
        served_name="t",
        serving=ServingConfig(require_gate=False, compute_dtype=stated),
        scaling=ServeScaling(gpus=gpus),
    )
    spec, settings = build_application(args)._bound_deployment.init_args[:2]
    assert spec.dtype == computed
    assert settings.compute_dtype == computed
