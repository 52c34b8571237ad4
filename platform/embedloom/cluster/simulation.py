"""A profile's stages placed by Ray itself, on as many raylets with made-up GPUs on this machine.

No actor starts: a placement group takes what an actor, engine, worker or replica would take, and the scheduler that
decides is the real one. Thirteen raylets need some 3 GB of memory and a minute. Import it after
``session.set_ray_environment``.
"""

import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from embedloom.config.cluster import Ask, Bundle, Machine, Profile, asks, format_table, machines, place

STORE_BYTES = 80 * 2**20  # Ray takes no less than 75 MiB
SETTLE_SECONDS = 1.5  # nothing changed for so long: what waits now, waits
DEADLINE_SECONDS = 30.0
_MACHINE_LABEL = "embedloom-machine"


@dataclass(frozen=True, slots=True)
class Observed:
    """What Ray did with one ask."""

    ask: Ask
    groups: tuple[PlacementGroup, ...]
    by_machine: dict[str, int]  # bundles placed
    pending: int
    states: tuple[str, ...] = ()  # Ray's own words about what is pending

    @property
    def placed(self) -> int:
        """Bundles placed."""
        return sum(self.by_machine.values())

    @property
    def held(self) -> dict[str, Bundle]:
        """Resources taken, by machine."""
        return {
            name: {key: amount * count for key, amount in self.ask.bundle.items()}
            for name, count in self.by_machine.items()
        }


@contextmanager
def simulated(profile: Profile) -> Iterator[dict[str, str]]:
    """A connected Ray of the profile's machines; yields machine names by node id."""
    folder = tempfile.mkdtemp(prefix="el-sim-", dir="/tmp")
    # Ray notes the newest cluster's address in this folder; the machine's own note must stay as it is.
    before = os.environ.get("RAY_TMPDIR")
    Path(folder, "ray").mkdir()
    os.environ["RAY_TMPDIR"] = folder
    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = Cluster(shutdown_at_exit=True)
    try:
        for machine in machines(profile):
            cluster.add_node(**_node_arguments(machine, folder))
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield {node["NodeID"]: node["Labels"][_MACHINE_LABEL] for node in ray.nodes() if node["Alive"]}
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_TMPDIR")
        if before is not None:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _node_arguments(machine: Machine, folder: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "num_cpus": int(min(machine.cpus, 10_000)),
        "num_gpus": int(machine.gpus),
        "object_store_memory": STORE_BYTES,
        "labels": {_MACHINE_LABEL: machine.name},
        "include_dashboard": False,
        "temp_dir": f"{folder}/ray",
    }
    if machine.memory_gib < 2**30:
        arguments["memory"] = int(machine.memory_gib * 2**30)
    return arguments


def observe(ask: Ask, names: dict[str, str]) -> Observed:
    """Ask Ray for an ask's maximum, and wait until nothing moves any more. What is placed stays held."""
    if ask.strategy == "PACK":
        groups = [placement_group([ask.bundle] * ask.maximum, strategy="PACK")]
    else:
        strategy = "STRICT_PACK" if ask.strategy == "STRICT_PACK" else "PACK"
        groups = [placement_group([ask.bundle], strategy=strategy) for _ in range(ask.maximum)]
    tables = _settled(groups)
    found: Counter[str] = Counter()
    states = []
    for table in tables:
        if table["state"] == "CREATED":
            found.update(names[node] for node in table["bundles_to_node_id"].values())
        else:
            states.append(str(table["stats"]["scheduling_state"]))
    pending = ask.maximum - sum(found.values())
    return Observed(ask, tuple(groups), dict(sorted(found.items())), pending, tuple(sorted(set(states))))


def _settled(groups: list[PlacementGroup]) -> list[dict[str, Any]]:
    deadline = time.monotonic() + DEADLINE_SECONDS
    last, since = -1, time.monotonic()
    while True:
        everything = placement_group_table()
        tables = [everything[group.id.hex()] for group in groups]
        created = sum(table["state"] == "CREATED" for table in tables)
        now = time.monotonic()
        if created != last:
            last, since = created, now
        if created == len(groups) or now - since > SETTLE_SECONDS or now > deadline:
            return tables
        time.sleep(0.1)


def release(observed: Observed) -> None:
    """Give back what an ask holds, and wait until Ray has it."""
    for group in observed.groups:
        remove_placement_group(group)
    ids = [group.id.hex() for group in observed.groups]
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        everything = placement_group_table()
        if all(everything.get(one, {"state": "REMOVED"})["state"] == "REMOVED" for one in ids):
            return
        time.sleep(0.05)


def report(profile: Profile, names: dict[str, str]) -> str:
    """Every stage placed alone, then all that want GPUs beside the training group; a line each."""
    lines, messages = [], []
    wanted = asks(profile)
    for ask in wanted:
        seen = observe(ask, names)
        lines.append(_line(seen, ""))
        messages.append(place(ask, machines(profile)).message)
        release(seen)
    training = observe(next(ask for ask in wanted if ask.stage == "training"), names)
    for ask in wanted:
        if ask.stage in {"embedding", "serve"} and "GPU" in ask.bundle:
            seen = observe(ask, names)
            lines.append(_line(seen, " beside training"))
            messages.append(place(ask, machines(profile), training.held).message)
            release(seen)
    release(training)
    head = f"placed by Ray {ray.__version__} on {len(names)} simulated nodes:"
    return f"{head}\n{format_table(lines, messages)}"


def _line(seen: Observed, beside: str) -> tuple[str, ...]:
    ask = seen.ask
    each = sorted(set(seen.by_machine.values()))
    spread = (
        "nowhere"
        if not each
        else f"{each[0]} a node"
        if len(each) == 1
        else f"{each[0]} to {each[-1]} a node"
    )
    fits = f"{seen.placed} on {len(seen.by_machine)} nodes"
    pending = f", {seen.pending} pending ({', '.join(seen.states).lower()})" if seen.pending else ""
    gang = "one group" if ask.strategy == "PACK" else "each for itself"
    return (f"{ask.stage}{beside}", f"{ask.maximum} {ask.what}s", ask.needs, gang, f"{fits}{pending}", spread)


def simulate(profile: Profile) -> str:
    """``report`` on a Ray that is started for it."""
    with simulated(profile) as names:
        return report(profile, names)
