"""What a profile's stages ask for and where it goes (``config/cluster.py``), worked by hand and by Ray itself."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from embedloom.config.cluster import (
    Ask,
    Machine,
    Profile,
    asks,
    capacity,
    copies,
    load_cluster,
    machines,
    place,
    placement_table,
)

ROOT = Path(__file__).parents[2]
NODES = [Machine("head-0", 30, 0), *(Machine(f"a100-{n}", 94, 8) for n in range(8))]
TRAINING = Ask("training", "worker", {"CPU": 11, "GPU": 1}, 64, 64, "PACK")


def test_machines_and_asks_of_the_64_gpu_profile():
    profile = load_cluster(ROOT / "cluster/cluster.yaml").profile("a100x64")
    found = machines(profile)
    names = ["head-0", *(f"cpu-{n}" for n in range(4)), *(f"a100-{n}" for n in range(8))]
    assert [machine.name for machine in found] == names
    assert sum(machine.gpus for machine in found) == 64
    wanted = {(ask.stage, ask.what): ask for ask in asks(profile)}
    assert [stage for stage, _ in wanted] == [
        "synthesis", "mining", "embedding", "training", "merging", "evaluation", "serve", "serve",
    ]  # fmt: skip
    assert wanted["training", "worker"] == TRAINING
    assert wanted["merging", "task"].bundle == {"CPU": 4, "memory": 8 * 2**30}
    assert wanted["serve", "gateway"].bundle == {"CPU": 0.1}


def test_a_single_replica_has_no_gateway():
    (ask,) = [ask for ask in asks(Profile()) if ask.stage == "serve"]
    assert (ask.what, ask.minimum, ask.maximum) == ("replica", 1, 1)


def test_an_engine_is_one_bundle_that_no_node_may_split():
    profile = Profile.model_validate(
        {
            "pools": {"head": {"cpus": 4, "memory_gib": 8}, "gpu": {"cpus": 32, "gpus": 8, "memory_gib": 64}},
            "stages": {"synthesis": {"max_actors": 2, "gpus": 4, "tensor_parallel": 4}},
            "object_store_mib": 1024,
        }
    )
    ask = asks(profile)[0]
    assert (ask.what, ask.strategy, ask.bundle) == ("engine", "STRICT_PACK", {"CPU": 1, "GPU": 4})


def test_copies_are_limited_by_the_scarcest_resource():
    node = Machine("n", 8, 4, 32)
    assert copies({"CPU": 2}, node) == 4
    assert copies({"CPU": 2, "GPU": 2}, node) == 2
    assert copies({"CPU": 1, "memory": 20 * 2**30}, node) == 1
    assert copies({"CPU": 0.1}, Machine("n", 0.3, 0)) == 3  # 0.3 / 0.1 is 2.9999999999999996
    assert copies({}, node) == float("inf")
    assert capacity({"GPU": 3}, [node, node]) == 2  # and not 8 // 3


def test_a_gang_is_placed_whole_or_not_at_all():
    whole = place(TRAINING, NODES)
    assert whole.by_machine == {f"a100-{n}": 8 for n in range(8)}
    assert whole.message == ""
    larger = Ask("training", "worker", {"CPU": 11, "GPU": 1}, 65, 65, "PACK")
    none = place(larger, NODES)
    assert (none.placed, none.by_machine) == (0, {})
    assert none.message == (
        "training: 65 of 65 workers x 11 CPUs + 1 GPU pending: 65 GPUs wanted, 64 GPUs free of 64 GPUs"
    )


def test_actors_beside_the_gang_say_what_they_lack():
    held = {f"a100-{n}": {"CPU": 88.0, "GPU": 8.0} for n in range(8)}
    embedding = Ask("embedding", "actor", {"CPU": 4, "GPU": 1}, 8, 64)
    found = place(embedding, NODES, held)
    assert found.placed == 0
    assert found.message == (
        "embedding: 64 of 64 actors x 4 CPUs + 1 GPU pending: 64 GPUs wanted, 0 GPUs free of 64 GPUs"
    )
    merging = Ask("merging", "task", {"CPU": 4}, 1, 20)
    assert place(merging, NODES, held).by_machine == {"head-0": 7} | {f"a100-{n}": 1 for n in range(8)}
    assert "5 of 20 tasks x 4 CPUs pending: 80 CPUs wanted" in place(merging, NODES, held).message


def test_what_no_node_can_hold_says_so():
    engine = Ask("synthesis", "engine", {"CPU": 2, "GPU": 16}, 1, 1, "STRICT_PACK")
    assert place(engine, NODES).message == (
        "synthesis: 1 of 1 engines x 2 CPUs + 16 GPUs pending: no node has 16 GPUs, the largest has 8 GPUs"
    )


def test_every_shipped_profile_places_all_its_stages():
    cluster = load_cluster(ROOT / "cluster/cluster.yaml")
    for profile in cluster.profiles.values():
        table, placements = placement_table(profile)
        assert all(one.message == "" and one.placed == one.ask.maximum for one in placements)
        assert len(table.splitlines()) == 1 + len(placements)


SCRIPT = """
import json
from embedloom.config.cluster import AuthConfig, load_cluster
from embedloom.cluster.session import ensure_token, set_ray_environment
from embedloom.config.shipped import SHIPPED_CLUSTER
auth = AuthConfig()
set_ray_environment(auth)
ensure_token(auth)
from embedloom.config.cluster import Ask, machines, place
from embedloom.cluster.simulation import observe, release, report, simulated

profile = load_cluster(SHIPPED_CLUSTER).profile("a100x64")
nodes = machines(profile)
alone = [
    Ask("synthesis", "engine", {"CPU": 4, "GPU": 8}, 1, 9, "STRICT_PACK"),
    Ask("synthesis", "engine", {"CPU": 4, "GPU": 4}, 1, 16, "STRICT_PACK"),
    Ask("synthesis", "engine", {"CPU": 4, "GPU": 16}, 1, 1, "STRICT_PACK"),
    Ask("training", "worker", {"CPU": 11, "GPU": 1}, 65, 65, "PACK"),
    Ask("embedding", "actor", {"CPU": 4, "GPU": 1}, 8, 64),
    Ask("serve", "replica", {"CPU": 2, "GPU": 0.5}, 1, 130),
]
def told(seen, expected):
    return [seen.placed, seen.pending, sorted(seen.by_machine.values()), list(seen.states), expected.placed, expected.message]
with simulated(profile) as names:
    found = []
    for ask in alone:
        seen = observe(ask, names)
        found.append(told(seen, place(ask, nodes)))
        release(seen)
    print(report(profile, names))
print(json.dumps(found))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_places_on_thirteen_simulated_nodes_what_the_arithmetic_says():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    wide, narrow, too_wide, gang, embedding, serve = json.loads(lines[-1])
    for placed, *_, expected, _message in (wide, narrow, too_wide, gang, embedding, serve):
        assert placed == expected
    assert wide[:3] == [8, 1, [1] * 8]  # nine engines of eight GPUs: one waits
    assert "1 of 9 engines x 4 CPUs + 8 GPUs pending: 72 GPUs wanted, 64 GPUs free of 64 GPUs" in wide[-1]
    assert narrow[:3] == [16, 0, [2] * 8]
    assert too_wide[:2] == [0, 1] and too_wide[3] == ["INFEASIBLE"]
    assert "no node has 16 GPUs, the largest has 8 GPUs" in too_wide[-1]
    assert gang[:2] == [0, 65] and "65 GPUs wanted, 64 GPUs free of 64 GPUs" in gang[-1]
    assert embedding[:3] == [64, 0, [8] * 8]
    assert serve[:3] == [128, 2, [16] * 8]
    table = "\n".join(lines[:-1])
    assert "on 13 simulated nodes" in table
    rows = {line.split("  ")[0]: line for line in lines}
    assert "64 on 8 nodes" in rows["training"] and "8 a node" in rows["training"]
    assert "0 on 0 nodes, 64 pending" in rows["embedding beside training"]
    assert (
        "serve: 16 of 16 replicas x 2 CPUs + 1 GPU pending: 16 GPUs wanted, 0 GPUs free of 64 GPUs" in table
    )
