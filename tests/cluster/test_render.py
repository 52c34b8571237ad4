import importlib
import json
import shlex
from pathlib import Path

import pytest
import yaml

from embedloom.cluster.manifests import documents, job_runtime_env
from embedloom.cluster.render import (
    check,
    check_document,
    check_launcher_config,
    check_ray_cluster,
    check_runtime_env,
    check_serve_config,
    render,
)
from embedloom.cluster.session import serve_environment
from embedloom.config.base import validate
from embedloom.config.cluster import LISTENER_VARIABLE, ClusterConfig, ListenerConfig, Profile, load_cluster
from embedloom.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster():
    return load_cluster(ROOT / "cluster/cluster.yaml")


def small_cluster(**pool) -> ClusterConfig:
    """Two kinds of machine whose numbers are easy to follow through the files."""
    worker = {
        "instance": "g5.xlarge",
        "cpus": 4,
        "gpus": 1,
        "accelerator": "A10G",
        "memory_gib": 16,
        "min_nodes": 1,
        "max_nodes": 3,
    }
    content = {
        "version": 1,
        "ray": {"version": "2.60.0", "python": "3.11", "image": "registry.example/loom:1"},
        "profiles": {
            "small": {
                "backend": "existing",
                "region": "eu-west-1",
                "object_store_mib": 2048,
                "pools": {
                    "head": {"instance": "m6i.large", "cpus": 2, "memory_gib": 4, "max_nodes": 1},
                    "gpu": {**worker, **pool},
                },
                "serve": {"max_replicas": 2, "gpus": 0.5},
            }
        },
    }
    return validate(ClusterConfig, content, "test")


def test_every_shipped_profile_renders_and_checks(cluster, tmp_path):
    for name in cluster.profiles:
        paths = render(cluster, name, tmp_path / name)
        assert {path.name for path in paths} >= {"ray_init.json", "runtime_env.yaml", "serve.yaml"}
        for path in paths:
            content = (
                json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
            )
            assert content == documents(cluster, name)[path.name]
        lines = check(cluster, name, project=ROOT)
        assert len(lines) == len(paths) + 3
        assert any("a stop waits 18 s for requests" in line for line in lines)


GOLDEN = Path(__file__).parent / "golden"  # embedloom cluster render --profile P --out tests/cluster/golden/P


@pytest.mark.parametrize("profile", ["local", "h100x1", "a100x64"])
def test_files_are_the_reviewed_ones(cluster, tmp_path, profile):
    rendered = {path.name: path.read_text() for path in render(cluster, profile, tmp_path)}
    assert rendered == {path.name: path.read_text() for path in (GOLDEN / profile).iterdir()}


def test_every_shipped_profile_has_golden_files(cluster):
    assert set(cluster.profiles) == {path.name for path in GOLDEN.iterdir()}


def test_local_profile_needs_no_cluster_files(cluster):
    files = documents(cluster, "local")
    assert set(files) == {"ray_init.json", "runtime_env.yaml", "serve.yaml"}
    assert files["ray_init.json"]["address"] == "local"
    assert files["serve.yaml"]["http_options"]["host"] == "127.0.0.1"


def test_launcher_says_what_the_pools_say():
    launcher = documents(small_cluster(), "small")["launcher.yaml"]
    options = launcher["available_node_types"]["gpu"].pop("docker")["worker_run_options"]
    assert options[0] == "--shm-size=18432m"  # 2 GiB of object store and 16 beside it
    assert launcher["max_workers"] == 3
    assert launcher["provider"] == {"type": "aws", "region": "eu-west-1"}
    assert launcher["available_node_types"] == {
        "head": {
            "resources": {"CPU": 2},
            "min_workers": 0,
            "max_workers": 0,
            "node_config": {"InstanceType": "m6i.large"},
        },
        "gpu": {
            "resources": {"CPU": 4, "GPU": 1, "accelerator_type:A10G": 1},
            "min_workers": 1,
            "max_workers": 3,
            "node_config": {"InstanceType": "g5.xlarge"},
        },
    }
    assert "--object-store-memory=1288490188 " in launcher["head_start_ray_commands"][-1]  # 30 % of 4 GiB
    assert "--object-store-memory=2147483648 " in launcher["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    assert all(
        "RAY_AUTH_MODE=token" in launcher[key][-1]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    )


def test_ray_cluster_says_what_the_pools_say():
    content = documents(small_cluster(), "small")["raycluster.yaml"]
    (group,) = content["spec"]["workerGroupSpecs"]
    assert (group["groupName"], group["minReplicas"], group["maxReplicas"]) == ("gpu", 1, 3)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert "gpu 3 x 4 CPU, 1 GPU" in check_ray_cluster(content, "x")


def test_serve_config_carries_the_scaling():
    (application,) = documents(small_cluster(), "small")["serve.yaml"]["applications"]
    assert application["args"]["scaling"]["max_replicas"] == 2
    assert application["args"]["scaling"]["gpus"] == 0.5


def test_pools_need_a_head():
    cluster = small_cluster()
    profile = cluster.profile("small")
    without = profile.model_copy(update={"pools": {"gpu": profile.pools["gpu"]}})
    with pytest.raises(ConfigError, match=r"profiles\.small\.pools: no pool named 'head', found gpu"):
        documents(cluster.model_copy(update={"profiles": {"small": without}}), "small")


def test_launcher_needs_instances():
    with pytest.raises(ConfigError, match=r"pools\.gpu\.instance: required for the launcher"):
        documents(small_cluster(instance=None), "small")


@pytest.mark.parametrize(
    ("path", "typo", "nearest"),
    [
        ((), "proxy_locaton", "proxy_location"),
        (("http_options",), "prt", "port"),
        (("applications", 0), "import_pth", "import_path"),
        (("applications", 0, "logging_config"), "log_levl", "log_level"),
        (("applications", 0, "deployments", 0), "max_queued_requets", "max_queued_requests"),
        (("applications", 0, "deployments", 0, "autoscaling_config"), "min_replica", "min_replicas"),
        (("applications", 0, "deployments", 0, "ray_actor_options"), "num_gpu", "num_gpus"),
    ],
)
def test_serve_typos_are_refused_with_the_nearest_key(path, typo, nearest):
    content = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    content["applications"][0]["deployments"] = [
        {"name": "endpoint", "autoscaling_config": {"max_replicas": 2}, "ray_actor_options": {"num_cpus": 1}}
    ]
    check_serve_config(content, "c.yaml")
    node = content
    for key in path:
        node = node[key]
    node[typo] = 1
    where = ".".join(str(key) for key in (*path, typo))
    with pytest.raises(
        ConfigError, match=rf"c\.yaml: {where}: unknown key.*nearest valid key is '{nearest}'"
    ):
        check_serve_config(content, "c.yaml")


def test_arguments_of_our_application_are_read():
    content = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    content["applications"][0]["args"]["serving"]["max_itmes"] = 1
    with pytest.raises(
        ConfigError, match=r"applications\.0\.args: serving\.max_itmes: .*nearest valid key is 'max_items'"
    ):
        check_serve_config(content, "c.yaml")


def test_runtime_env_typos_are_refused():
    with pytest.raises(
        ConfigError, match=r"r\.yaml: env_var: unknown key; the nearest valid key is 'env_vars'"
    ):
        check_runtime_env({"env_var": {}}, "r.yaml")


def test_spot_labels_storage_and_haproxy_reach_the_nodes():
    cluster = small_cluster(spot=True, labels={"tier": "cheap"})
    content = cluster.model_dump()
    content["profiles"]["small"] |= {
        "storage": {"root": "/mnt/runs", "claim": "runs", "mount_command": "mount /mnt/runs"},
        "spill_folder": "/mnt/fast",
    }
    content["profiles"]["small"]["serve"]["haproxy"] = True
    files = documents(validate(ClusterConfig, content, "test"), "small")
    node = files["launcher.yaml"]["available_node_types"]["gpu"]
    assert node["labels"] == {"tier": "cheap", "ray.io/market-type": "spot"}
    assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert files["launcher.yaml"]["initialization_commands"] == ["mount /mnt/runs"]
    assert "--volume=/mnt/runs:/mnt/runs" in files["launcher.yaml"]["docker"]["run_options"]
    (group,) = files["raycluster.yaml"]["spec"]["workerGroupSpecs"]
    assert group["labels"] == {"tier": "cheap"}
    assert group["rayStartParams"]["object-spilling-directory"] == "/mnt/fast"
    pod = group["template"]["spec"]
    assert pod["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
    assert {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in pod["containers"][0]["env"]
    assert {"name": "RAY_NODE_MARKET_TYPE", "value": "spot"} in pod["containers"][0]["env"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "spill": "/mnt/fast", "runs": "/mnt/runs"}
    (application,) = files["serve.yaml"]["applications"]
    assert application["args"]["model_folder"] == "/mnt/runs/served"


def test_job_and_service_carry_the_cluster_and_their_own():
    files = documents(small_cluster(), "small")
    cluster = files["raycluster.yaml"]["spec"]
    service = files["rayservice.yaml"]["spec"]
    assert service["rayClusterConfig"] == cluster
    assert yaml.safe_load(service["serveConfigV2"]) == files["serve.yaml"]
    job = files["rayjob.yaml"]["spec"]
    assert job["rayClusterSpec"]["workerGroupSpecs"] == cluster["workerGroupSpecs"]
    assert job["entrypoint"].startswith(
        "python -m embedloom.cli run /etc/embedloom/run.yaml --profile small "
    )
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "config", "configMap": {"name": "embedloom-small"}} in head["volumes"]
    service["serveConfigV2"] = service["serveConfigV2"].replace("import_path", "import_pth")
    with pytest.raises(
        ConfigError, match=r"rayservice\.yaml: spec\.serveConfigV2: applications\.0\.import_pth"
    ):
        check_document("rayservice.yaml", files["rayservice.yaml"])


def test_serves_own_rules_still_hold():
    content = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    content["http_options"]["port"] = "eighty"
    with pytest.raises(ConfigError, match=r"c\.yaml: http_options\.port: .*seen: 'eighty'"):
        check_serve_config(content, "c.yaml")


def test_launcher_typos_are_refused():
    launcher = documents(small_cluster(), "small")["launcher.yaml"]
    launcher["available_node_types"]["gpu"]["min_worker"] = 1
    with pytest.raises(ConfigError, match=r"available_node_types\.gpu: .*min_worker"):
        check_launcher_config(launcher, "launcher.yaml")


def test_shipped_runtime_env_is_the_one_submit_sends():
    assert yaml.safe_load((ROOT / "cluster/runtime_env.yaml").read_text()) == job_runtime_env()
    assert job_runtime_env(Path("/p"))["working_dir"] == "/p"


def test_platform_folder_is_no_package():
    # It would shadow the standard library's platform module in every Ray worker, silently.
    assert not (ROOT / "platform/__init__.py").exists()


def test_a_local_session_says_to_serve_how_it_listens():
    found = serve_environment(Profile(serve={"listener": {"max_headers": 7, "max_client_connections": None}}))
    assert found["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0"
    module, _, function = found["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))
    limits = ListenerConfig.model_validate_json(found[LISTENER_VARIABLE])
    assert (limits.max_headers, limits.max_client_connections) == (7, None)
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in found
    haproxy = serve_environment(Profile(serve={"haproxy": True, "listener": {"max_header_kib": 8}}))
    assert haproxy["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert haproxy["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] == str(9 * 1024)
    assert haproxy["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] == "10"


def test_a_launchers_shell_hands_the_bounds_on_whole():
    launcher = documents(small_cluster(), "small")["launcher.yaml"]
    workers = launcher["available_node_types"]["gpu"]["docker"]["worker_run_options"]
    for options in (launcher["docker"]["head_run_options"], workers):
        # Ray joins the options of `docker run` by spaces.
        (stated,) = [word for word in shlex.split(" ".join(options)) if LISTENER_VARIABLE in word]
        assert json.loads(stated.removeprefix(f"--env={LISTENER_VARIABLE}="))["max_headers"] == 100
        assert "--env=RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1" in options


def test_the_grace_of_a_stop_reaches_the_pods_and_is_held_against_the_time_of_a_request():
    content = small_cluster().model_dump()
    content["profiles"]["small"]["serve"]["termination_grace_seconds"] = 90
    cluster = validate(ClusterConfig, content, "test")
    files = documents(cluster, "small")
    for name in ("raycluster.yaml", "rayservice.yaml"):
        spec = files[name]["spec"]
        spec = spec.get("rayClusterConfig", spec)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 90
    scaling = cluster.profile("small").serve
    assert scaling.cut_off(60.0) is None
    assert "a stop waits 78 s" in scaling.cut_off(81.0) and "may take 81 s" in scaling.cut_off(81.0)
