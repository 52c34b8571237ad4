"""The cross-checks of a profile (``config/cluster.py``): each refuses with the numbers it compared."""

import pytest

from embedloom.config.base import validate
from embedloom.config.cluster import (
    Machine,
    PoolConfig,
    Profile,
    ServeScaling,
    StorageConfig,
    check_actor_gpus,
)
from embedloom.errors import ConfigError

NODE = {"cpus": 16, "gpus": 8, "memory_gib": 64, "max_nodes": 2}
HEAD = {"cpus": 4, "memory_gib": 16, "max_nodes": 1}


def profile(head=HEAD, node=NODE, **content) -> Profile:
    pools = {"head": head, "gpu": node}
    return validate(Profile, {"backend": "existing", "pools": pools, **content}, "c.yaml")


def stages(**content):
    return {"stages": content}


def test_a_profile_that_fits_is_accepted():
    made = profile(
        object_store_mib=768,  # exactly the eight embedding actors of a node x 3 blocks x 32 MiB
        **stages(
            synthesis={"min_actors": 4, "max_actors": 4, "gpus": 4, "tensor_parallel": 4},
            embedding={"min_actors": 16, "max_actors": 16, "cpus": 2, "gpus": 1, "memory_gib": 8},
            training={"workers": 16, "cpus": 2, "gpus": 1},
        ),
    )
    assert made.total_gpus == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # 36 CPUs in all; one stays free for reading.
        (
            stages(mining={"min_actors": 18, "max_actors": 18, "cpus": 2}),
            r"stages\.mining: 18 actors x 2 CPUs \+ 1 for reading exceed 36 CPUs",
        ),
        (
            stages(evaluation={"min_actors": 17, "max_actors": 17, "cpus": 1, "gpus": 1}),
            r"stages\.evaluation: 17 actors x 1 GPUs exceed 16 GPUs",
        ),
        (
            stages(training={"workers": 17, "cpus": 1, "gpus": 1}),
            r"stages\.training: 17 workers x 1 GPUs exceed 16 GPUs",
        ),
        (
            stages(embedding={"min_actors": 10, "max_actors": 10, "memory_gib": 20}),
            r"stages\.embedding: 10 actors x 20 GiB exceed 144 GiB",
        ),
        # 24 CPUs of 36 in sum, but 12 CPUs fit once on a node of 16 and not on the head.
        (
            stages(mining={"min_actors": 2, "max_actors": 2, "cpus": 12, "gpus": 1})
            | {"serve": {"min_replicas": 3, "max_replicas": 3, "cpus": 12}},
            r"serve: 3 replicas x 12 CPUs do not fit node by node: 1 fit on gpu-0, 2 on all 3 nodes",
        ),
        (
            stages(mining={"gpus": 3}),
            r"stages\.mining: gpus is 3, which does not divide a node's GPUs \(8\), so some would idle",
        ),
        (
            stages(mining={"gpus": 0.3}),
            r"stages\.mining: gpus is 0\.3, which does not divide a node's GPUs \(8\)",
        ),
        (stages(mining={"gpus": 1.5}), r"stages\.mining: gpus is 1\.5; above 1 only whole GPUs"),
        (
            stages(synthesis={"gpus": 16, "tensor_parallel": 16}),
            r"stages\.synthesis: tensor_parallel is 16, but a node has at most 8 GPUs; an engine must fit in one",
        ),
        (stages(mining={"gpus": 16}), r"stages\.mining: an actor takes 16 GPUs, but a node has at most 8"),
        ({"serve": {"gpus": 0.3}}, r"serve: gpus is 0\.3, which does not divide a node's GPUs \(8\)"),
        # 16 actors of one CPU on a node, three blocks each.
        (
            {"object_store_mib": 1000, "block_mib": 32, **stages(embedding={"max_actors": 64})},
            r"object_store_mib is 1000, but stages\.embedding may hold 1536 MiB on a node: 16 actors x 3 blocks x 32 MiB",
        ),
        (
            {"object_store_mib": 65536},
            r"object_store_mib is 65536, but a node of pools\.gpu has 65536 MiB of memory",
        ),
        (
            {"logical_cpus": 4},
            "logical_cpus, gpus and accelerator describe one machine; with pools, each pool states its own",
        ),
    ],
)
def test_what_does_not_fit_is_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        profile(**content)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"max_nodes": 2}, r"pools\.head: max_nodes is 2; a cluster has one head"),
        ({"spot": True}, "cannot be spot"),
    ],
)
def test_the_head_is_one_machine_that_stays(head, message):
    with pytest.raises(ConfigError, match=message):
        profile(head=HEAD | head)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"max_replicas": 4, "max_ongoing_requests": 64, "max_queued_requests": 255},
            "max_queued_requests is 255, below 4 max_replicas x 64 max_ongoing_requests",
        ),
        (
            {
                "max_replicas": 2,
                "target_ongoing_requests": 9,
                "max_ongoing_requests": 8,
                "max_queued_requests": 16,
            },
            "target_ongoing_requests is 9, above max_ongoing_requests 8, so it would never scale up",
        ),
        ({"max_queued_requests": 8}, "are set together, or neither is"),
        ({"idle_to_zero_seconds": 60}, "min_replicas is 1; only 0 can scale to zero"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2, below min_replicas 3"),
    ],
)
def test_serve_scaling_is_consistent(content, message):
    with pytest.raises(ConfigError, match=message):
        validate(ServeScaling, content, "c.yaml")


def test_a_queue_as_deep_as_the_replicas_is_accepted():
    scaling = ServeScaling(
        max_replicas=4, target_ongoing_requests=8, max_ongoing_requests=64, max_queued_requests=256
    )
    assert scaling.limits == {"max_ongoing_requests": 64, "max_queued_requests": 256}
    assert ServeScaling().limits == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"root": "runs"}, "root is 'runs'; allowed: an absolute folder, s3://... or gs://..."),
        (
            {"root": "s3://b/x", "claim": "c"},
            "claim is set, but root is 's3://b/x', no folder to mount it at",
        ),
        ({"mount_command": "mount x"}, "mount_command is set, but root is None"),
    ],
)
def test_storage_roots_are_places(content, message):
    with pytest.raises(ConfigError, match=message):
        validate(StorageConfig, content, "c.yaml")


def test_runs_lie_below_the_storage_root_unless_they_have_a_place():
    shared = Profile(storage=StorageConfig(root="s3://bucket/loom/"))
    assert shared.run_folder("runs/a") == "s3://bucket/loom/runs/a"
    assert shared.run_folder("/data/runs/a") == "/data/runs/a"
    assert shared.run_folder("gs://other/a") == "gs://other/a"
    assert Profile().run_folder("runs/a") == "runs/a"


def test_pools_of_generators_are_checked_by_the_same_rule():
    nodes = [Machine("n", 96, 8)]
    check_actor_gpus(PoolConfig(gpus=4, tensor_parallel=4), nodes, "x")
    with pytest.raises(ValueError, match=r"synthesis\.generators\.2\.pool: gpus is 6, which does not divide"):
        check_actor_gpus(PoolConfig(gpus=6, tensor_parallel=6), nodes, "synthesis.generators.2.pool")
