"""Pods of a profile (``cluster/manifests.py``), and what would keep them from starting (``cluster/pods.py``)."""

import json
import shlex
from pathlib import Path

import pytest
from ray.autoscaler._private.aws.config import _configure_from_network_interfaces
from typer.testing import CliRunner

from embedloom.cli import app
from embedloom.cluster.manifests import documents
from embedloom.cluster.pods import check_pods, gated
from embedloom.cluster.render import check
from embedloom.config.base import validate
from embedloom.config.cluster import ClusterConfig, image_reference, load_cluster
from embedloom.config.run import load_run
from embedloom.config.shipped import SHIPPED_CLUSTER
from embedloom.errors import ConfigError

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "0123456789abcdef" * 4


def content(gpu=None, head=None, image="registry.example/loom:1", **profile) -> dict:
    """A cluster of a head and p4de nodes in which nothing is wrong; arguments replace single keys."""
    return {
        "version": 1,
        "ray": {"version": "2.60.0", "python": "3.11", "image": image},
        "profiles": {
            "small": {
                "backend": "existing",
                "namespace": "team",
                "object_store_mib": 100_000,
                "secrets": {"HF_TOKEN": {"secret": "hub", "key": "token"}},
                "pools": {
                    "head": {"instance": "m6i.8xlarge", "cpus": 30, "memory_gib": 100, "max_nodes": 1, **(head or {})},
                    "gpu": {
                        "instance": "p4de.24xlarge", "cpus": 94, "gpus": 8, "accelerator": "A100", "memory_gib": 1000,
                        "max_nodes": 2, "tolerations": [{"key": "nvidia.com/gpu"}], **(gpu or {}),
                    },
                },
                **profile,
            }
        },
    }  # fmt: skip


def cluster(**changes) -> ClusterConfig:
    return validate(ClusterConfig, content(**changes), "c")


def pod(config: ClusterConfig, pool: str = "gpu", kind: str = "raycluster") -> dict:
    spec = documents(config, "small")[f"{kind}.yaml"]["spec"]
    spec = spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec))
    if pool == "head":
        return spec["headGroupSpec"]["template"]["spec"]
    return next(one for one in spec["workerGroupSpecs"] if one["groupName"] == pool)["template"]["spec"]


KINDS = ("raycluster", "rayjob", "rayservice")


@pytest.mark.parametrize("kind", KINDS)
def test_variables_and_secrets_reach_the_pool_that_names_them(kind):
    config = cluster(gpu={"env": {"NCCL_DEBUG": "INFO"}, "secrets": ["HF_TOKEN"]})
    (container,) = pod(config, kind=kind)["containers"]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
    assert {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}},
    } in container["env"]
    (head,) = pod(config, "head", kind)["containers"]
    assert not {"NCCL_DEBUG", "HF_TOKEN"} & {one["name"] for one in head["env"]}


@pytest.mark.parametrize("kind", KINDS)
def test_volumes_tolerations_and_pull_secrets_reach_the_pods(kind):
    volumes = {
        "data": {"path": "/data", "claim": "corpora", "read_only": True},
        "certs": {"path": "/etc/certs", "secret": "ca"},
        "scratch": {"path": "/scratch", "host_path": "/mnt/disk"},
    }
    tolerations = [{"key": "nvidia.com/gpu"}, {"key": "team", "value": "search", "effect": None}]
    spec = pod(
        cluster(gpu={"volumes": volumes, "tolerations": tolerations, "image_pull_secrets": ["reg"]}),
        kind=kind,
    )
    assert [one for one in spec["volumes"] if one["name"] in volumes] == [
        {"name": "data", "persistentVolumeClaim": {"claimName": "corpora"}},
        {"name": "certs", "secret": {"secretName": "ca"}},
        {"name": "scratch", "hostPath": {"path": "/mnt/disk", "type": "DirectoryOrCreate"}},
    ]
    mounts = {one["name"]: one for one in spec["containers"][0]["volumeMounts"]}
    assert mounts["data"] == {"name": "data", "mountPath": "/data", "readOnly": True}
    assert spec["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "search"},
    ]
    assert spec["imagePullSecrets"] == [{"name": "reg"}]


def test_the_pod_that_submits_a_job_can_pull_the_image_too():
    job = documents(cluster(head={"image_pull_secrets": ["reg"]}), "small")["rayjob.yaml"]["spec"]
    submitter = job["submitterPodTemplate"]["spec"]
    assert submitter["imagePullSecrets"] == [{"name": "reg"}]
    assert submitter["restartPolicy"] == "Never"
    assert submitter["containers"][0]["image"] == "registry.example/loom:1"
    assert "submitterPodTemplate" not in documents(cluster(), "small")["rayjob.yaml"]["spec"]


def test_efa_asks_for_devices_large_pages_locked_memory_and_its_variables():
    (container,) = pod(cluster(gpu={"fabric": "efa", "fabric_devices": 4}))["containers"]
    limits = container["resources"]["limits"]
    assert (
        limits == container["resources"]["requests"]
    )  # Kubernetes refuses devices and large pages that differ
    assert limits["vpc.amazonaws.com/efa"] == "4"
    assert limits["hugepages-2Mi"] == "5120Mi"
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert env["FI_PROVIDER"] == "efa" and env["FI_EFA_USE_DEVICE_RDMA"] == "1"


def test_infiniband_names_its_devices_and_keeps_nccl_from_falling_back():
    gpu = {
        "fabric": "infiniband",
        "fabric_devices": 8,
        "fabric_resource": "rdma/ib",
        "env": {"NCCL_IB_HCA": "mlx5_2"},
    }
    (container,) = pod(cluster(gpu=gpu))["containers"]
    assert container["resources"]["limits"]["rdma/ib"] == "8"
    assert "hugepages-2Mi" not in container["resources"]["limits"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert (env["NCCL_NET"], env["NCCL_IB_HCA"]) == ("IB", "mlx5_2")  # the pool's own words win


def test_shared_memory_has_room_beside_the_object_store():
    sizes = {}
    for pool in ("head", "gpu"):
        (shm,) = [one for one in pod(cluster(), pool)["volumes"] if one["name"] == "shm"]
        sizes[pool] = shm["emptyDir"]["sizeLimit"]
    # 30 % of the head's 100 GiB is 30,720 MiB of object store, less than the profile's 100,000; 16 GiB are beside it.
    assert sizes == {"head": "47104Mi", "gpu": "116384Mi"}
    config = cluster(shared_memory_mib=150_000)
    (shm,) = [one for one in pod(config)["volumes"] if one["name"] == "shm"]
    assert shm["emptyDir"]["sizeLimit"] == "150000Mi"


def test_one_setting_moves_what_is_fetched_to_a_nodes_disk():
    spec = pod(cluster(cache_folder="/mnt/nvme/models"))
    env = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
    assert env["EMBEDLOOM_CACHE"] == "/mnt/nvme/models"
    assert env["HF_HOME"] == "/mnt/nvme/models/huggingface"
    assert {"name": "cache", "mountPath": "/mnt/nvme/models"} in spec["containers"][0]["volumeMounts"]
    assert {
        "name": "cache",
        "hostPath": {"path": "/mnt/nvme/models", "type": "DirectoryOrCreate"},
    } in spec["volumes"]


def test_a_cache_below_the_storage_root_needs_no_volume_of_its_own():
    storage = {"root": "/mnt/runs", "claim": "runs"}
    spec = pod(cluster(cache_folder="/mnt/runs/models", storage=storage))
    assert {one["name"] for one in spec["volumes"]} == {"shm", "runs"}
    assert {"name": "HF_HOME", "value": "/mnt/runs/models/huggingface"} in spec["containers"][0]["env"]


LAUNCHED = {
    "region": "us-west-2",
    "launcher": {"subnet": "subnet-1", "security_groups": ["sg-1"], "iam_profile": "node"},
}


def test_the_launchers_nodes_have_the_same():
    gpu = {
        "fabric": "efa", "fabric_devices": 4, "placement_group": "close", "disk_gib": 300, "secrets": ["HF_TOKEN"],
        "env": {"GREETING": "two words"}, "volumes": {"data": {"path": "/data", "host_path": "/mnt/data", "read_only": True}},
    }  # fmt: skip
    launcher = documents(cluster(gpu=gpu, cache_folder="/mnt/nvme/models", **LAUNCHED), "small")[
        "launcher.yaml"
    ]
    node = launcher["available_node_types"]["gpu"]["node_config"]
    assert node["Placement"] == {"GroupName": "close"}
    assert node["IamInstanceProfile"] == {"Name": "node"}
    assert node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 300
    cards = [
        (one["NetworkCardIndex"], one["DeviceIndex"], one["InterfaceType"])
        for one in node["NetworkInterfaces"]
    ]
    assert cards == [(0, 0, "efa"), (1, 1, "efa"), (2, 1, "efa"), (3, 1, "efa")]
    options = launcher["available_node_types"]["gpu"]["docker"]["worker_run_options"]
    # Ray joins options by spaces for a shell, so one with spaces must still be one.
    words = shlex.split(" ".join(options))
    assert "--env=GREETING=two words" in words and "--volume=/mnt/data:/data:ro" in words
    assert {"--shm-size=116384m", "--device=/dev/infiniband", "--ulimit=memlock=-1:-1"} <= set(words)
    assert "--env=HF_HOME=/mnt/nvme/models/huggingface" in words
    assert "--volume=/mnt/nvme/models:/mnt/nvme/models" in launcher["docker"]["run_options"]
    assert launcher["file_mounts"]["~/.embedloom/secrets.env"] == "~/.embedloom/secrets.env"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert launcher[key][-1].startswith("set -a && . ~/.embedloom/secrets.env && set +a && ")


def test_rays_own_bootstrap_takes_the_launchers_interfaces():
    launcher = documents(cluster(gpu={"fabric": "efa", "fabric_devices": 4}, **LAUNCHED), "small")[
        "launcher.yaml"
    ]
    seen = _configure_from_network_interfaces(launcher)["available_node_types"]
    assert seen["gpu"]["node_config"]["SubnetIds"] == ["subnet-1"] * 4
    assert seen["head"]["node_config"]["SubnetIds"] == ["subnet-1"]
    assert seen["head"]["node_config"]["SecurityGroupIds"] == ["sg-1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": {"fabric": "efa"}, "region": "r"}, r"launcher\.subnet: required for the interfaces of pools\.gpu\.fabric"),
        (
            {"gpu": {"volumes": {"data": {"path": "/data", "claim": "x"}}}, "region": "r"},
            r"pools\.gpu\.volumes\.data\.host_path: required for the launcher",
        ),
    ],
)  # fmt: skip
def test_the_launcher_refuses_what_it_cannot_make(changes, message):
    with pytest.raises(ConfigError, match=message):
        documents(cluster(**changes), "small")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": {"secrets": ["WANDB"]}}, r"pools\.gpu\.secrets: WANDB is not defined; defined .* HF_TOKEN"),
        ({"gpu": {"secrets": ["HF_TOKEN"], "env": {"HF_TOKEN": "x"}}}, r"HF_TOKEN is stated in both env and secrets"),
        ({"gpu": {"env": {"HF_HOME": "/x"}}, "cache_folder": "/y"}, r"HF_HOME is stated beside cache_folder"),
        ({"gpu": {"env": {"A-B": "x"}}}, r"'A-B' is no name of a variable"),
        ({"gpu": {"volumes": {"d": {"path": "/dev/shm", "claim": "x"}}}}, r"'/dev/shm' is mounted already, by the object"),
        (
            {"gpu": {"volumes": {"a": {"path": "/d", "claim": "x"}, "b": {"path": "/d", "claim": "y"}}}},
            r"volumes\.b\.path: '/d' is mounted already, by volumes\.a",
        ),
        (
            {"gpu": {"volumes": {"d": {"path": "/mnt/runs", "host_path": "/nfs"}}}, "storage": {"root": "/mnt/runs"}},
            r"'/mnt/runs' is mounted already, by storage\.root",
        ),
        ({"gpu": {"volumes": {"shm": {"path": "/d", "claim": "x"}}}}, r"'shm' is not allowed"),
        ({"gpu": {"volumes": {"d": {"path": "/d"}}}}, r"no source; one of claim, secret, config_map, host_path"),
        ({"gpu": {"volumes": {"d": {"path": "/d", "claim": "x", "secret": "y"}}}}, r"claim and secret are both set"),
        ({"image": "Registry/Loom"}, r"'Registry/Loom' is no image; allowed: registry/name:tag or"),
        ({"image": "registry.example/loom@sha256:12"}, r"is no image"),
    ],
)  # fmt: skip
def test_a_profile_is_refused_for(changes, message):
    with pytest.raises(ConfigError, match=message):
        cluster(**changes)


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("loom", (None, "loom", None, None)),
        ("team/loom:1.0", (None, "team/loom", "1.0", None)),
        ("ghcr.io/team/loom:1.0", ("ghcr.io", "team/loom", "1.0", None)),
        ("localhost:5000/loom", ("localhost:5000", "loom", None, None)),
        ("localhost/loom:x", ("localhost", "loom", "x", None)),
        (f"1.dkr.ecr.us-west-2.amazonaws.com/loom@{DIGEST}", ("1.dkr.ecr.us-west-2.amazonaws.com", "loom", None, DIGEST)),
        (f"ghcr.io/loom:2@{DIGEST}", ("ghcr.io", "loom", "2", DIGEST)),
    ],
)  # fmt: skip
def test_parts_of_an_image(image, parts):
    found = image_reference(image)
    assert (found.registry, found.name, found.tag, found.digest) == parts


def test_a_digest_reaches_every_container():
    image = f"registry.example/loom@{DIGEST}"
    files = documents(cluster(image=image, **LAUNCHED), "small")
    assert json.dumps(files).count(image) == 3 * 2 + 1  # head and worker of three kinds, and the launcher


def test_nothing_is_wrong_with_a_cluster_in_which_all_fits():
    report = check_pods(cluster(), "small")
    assert report.problems == ()
    assert any("driver 580" in one for one in report.needs)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image": None}, "ray.image: missing"),
        ({"image": "loom:1"}, "'loom:1' names no registry"),
        ({"image": "registry.example/loom"}, "no tag but the moving one"),
        ({"image": "registry.example/loom:latest"}, "no tag but the moving one"),
        ({"gpu": {"tolerations": []}}, "pools.gpu.tolerations: none for nvidia.com/gpu:NoSchedule"),
        ({"gpu": {"tolerations": [{"key": "other"}]}}, "pools.gpu.tolerations: none"),
        ({"gpu": {"fabric": "efa", "hugepages_mib": 0}}, "pools.gpu.hugepages_mib: 0 with fabric efa"),
        ({"gpu": {"fabric": "efa", "fabric_devices": 5}}, "fabric_devices: 5, but p4de.24xlarge has 4 EFA"),
        ({"gpu": {"cpus": 96}}, "pools.gpu.cpus: 96, but p4de.24xlarge has 96, of which Kubernetes keep 1"),
        ({"head": {"cpus": 31}}, "pools.head.cpus: 31, but m6i.8xlarge has 32, of which Kubernetes and the autoscaler"),
        ({"gpu": {"memory_gib": 1152}}, "pools.gpu.memory_gib: 1152, but of p4de.24xlarge's 1152 pods get at most 1094"),
        ({"gpu": {"instance": "p5.48xlarge", "gpus": 16}}, "pools.gpu.gpus: 16, but p5.48xlarge has 8"),
        ({"shared_memory_mib": 100_000}, "shared_memory_mib: 100000, not above the object store of 100000 on pools.gpu"),
        ({"storage": {"root": "/mnt/runs"}}, "storage.claim: missing, so '/mnt/runs' is a folder of each container's own"),
    ],
)  # fmt: skip
def test_a_pod_would_not_start_for(changes, problem):
    report = check_pods(cluster(**changes), "small")
    assert len(report.problems) == 1 and problem in report.problems[0], report.problems


def test_large_pages_are_taken_from_a_nodes_memory():
    # 95 % of 1,152 GiB are 1,094.4; 5 GiB of them are large pages.
    fits = {"fabric": "efa", "fabric_devices": 4, "memory_gib": 1089}
    assert check_pods(cluster(gpu=fits), "small").problems == ()
    (problem,) = check_pods(cluster(gpu=fits | {"memory_gib": 1090}), "small").problems
    assert "at most 1089" in problem and "5120 MiB of large pages" in problem


def test_needs_name_the_commands_that_meet_them():
    config = cluster(
        gpu={"secrets": ["HF_TOKEN"], "image_pull_secrets": ["reg"], "instance": "z9.metal", "fabric": "infiniband"},
        storage={"root": "/mnt/runs", "claim": "runs"},
        spill_folder="/mnt/nvme/spill",
    )  # fmt: skip
    needs = "\n".join(check_pods(config, "small").needs)
    assert "kubectl create secret generic hub --namespace team --from-literal=token=..." in needs
    assert "kubectl create secret docker-registry reg --namespace team" in needs
    assert "kubectl get pvc runs --namespace team" in needs
    assert "1 rdma/rdma_shared_device_a a node" in needs
    assert "z9.metal, a type that this check does not know" in needs
    assert "spill_folder: a disk mounted at or above /mnt/nvme/spill" in needs


def test_gated_models_of_a_run_need_a_token_in_every_pool():
    run = load_run(ROOT / "jobs/configs/nemotron_8b.yaml")
    problems = check_pods(cluster(gpu={"secrets": ["HF_TOKEN"]}), "small", run).problems
    assert all(one.startswith("pools.head.secrets: no HF_TOKEN") for one in problems)
    named = {one.split("'")[1] for one in problems}
    # By hand, of the run config's six generators, two teachers, one base and one corpus.
    assert named == {
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        "meta-llama/Llama-3.3-70B-Instruct",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
        "meta-llama/Llama-3.1-8B",
        "nvidia/Nemotron-CC-v2:Diverse-QA",
    }
    assert any("encoder.base is 'meta-llama/Llama-3.1-8B'" in one for one in problems)
    both = cluster(gpu={"secrets": ["HF_TOKEN"]}, head={"env": {"HF_TOKEN": "hf_x"}})
    assert check_pods(both, "small", run).problems == ()
    quickstart = load_run(ROOT / "jobs/configs/quickstart.yaml")
    assert check_pods(cluster(), "small", quickstart).problems == ()


def test_gated_names_carry_their_keys():
    found = list(gated({"a": [{"model": "meta-llama/X"}, {"model": "smollm2-135m"}], "b": 1, "c": None}))
    assert found == [("a.0.model", "meta-llama/X")]


def test_the_shipped_cluster_lacks_a_registry_and_nothing_else():
    run = load_run(ROOT / "jobs/configs/nemotron_8b.yaml")
    (problem,) = check_pods(load_cluster(SHIPPED_CLUSTER), "a100x64", run).problems
    assert "names no registry" in problem


def invoke(*words):
    return CliRunner().invoke(app, words)


def test_the_command_prints_all_and_fails_for_a_problem(tmp_path):
    words = ("cluster", "check", "--profile", "a100x64", "--pods", "--run", "nemotron_8b")
    shown = invoke(*words)
    assert str(shown.exception) == "--pods: 1 problems of profile a100x64; the lines above say which"
    assert "problem: ray.image: 'embedloom:0.1.0' names no registry" in shown.output
    assert "needed: Secret huggingface with key token, for HF_TOKEN" in shown.output
    mine = (
        (ROOT / "cluster/cluster.yaml")
        .read_text()
        .replace("image: embedloom:", "image: ghcr.io/us/embedloom:")
    )
    (tmp_path / "cluster.yaml").write_text(mine)
    assert invoke(*words, "--cluster", str(tmp_path / "cluster.yaml")).exit_code == 0
    assert "has no pools, so it makes no pods" in str(invoke("cluster", "check", "--pods").exception)
    assert "is read with --pods only" in str(invoke("cluster", "check", "--run", "quickstart").exception)


def test_every_key_fits_kuberays_own_definitions(kuberay_crds):
    full = {
        "env": {"A": "b"}, "secrets": ["HF_TOKEN"], "image_pull_secrets": ["reg"], "fabric": "efa",
        "tolerations": [{"key": "k", "value": "v", "effect": "NoExecute"}, {"key": "k", "effect": None}],
        "volumes": {
            "a": {"path": "/a", "claim": "c", "read_only": True}, "b": {"path": "/b", "secret": "s"},
            "c": {"path": "/c", "config_map": "m"}, "d": {"path": "/d", "host_path": "/h"},
        },
    }  # fmt: skip
    storage = {"root": "/mnt/runs", "claim": "runs"}
    config = cluster(
        gpu=full, head={**full, "fabric": "infiniband"}, storage=storage, cache_folder="/m", spill_folder="/s"
    )
    lines = check(config, "small", project=ROOT, crds=kuberay_crds)
    assert sum("valid for the definition of ray.io/v1" in line for line in lines) == 3
