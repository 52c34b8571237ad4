"""A worker group that goes on with fewer workers when machines are lost: what Ray Train needs to see it at once."""

import socket
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal.execution.callback import ControllerCallback

from embedloom.core.progress import note

_ANSWER_SECONDS = 10.0
_CONNECT_SECONDS = 3.0
# Ray calls a machine dead after five health checks of up to ten seconds, three seconds apart (RAY_health_check_*).
_DEATH_SECONDS = 75.0


class LostMachines(ControllerCallback):
    """Looks at the cluster's machines anew before a failed group is started again.

    Ray 2.60 counts machines every 20 seconds, and calls one dead a while after its workers are. A group that is started
    on an older count waits a minute for a machine that is gone (``RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S``) before it is
    tried with fewer workers.
    """

    def __init__(self, label: str) -> None:
        self._label = label

    def before_controller_execute_failure_decision(self, failure_decision: object) -> None:
        """Wait until machines that do not answer are called dead; then count."""
        try:
            silent = {node["NodeID"] for node in ray.nodes() if node["Alive"] and not answers(node)}
            deadline = time.monotonic() + _DEATH_SECONDS
            while silent & {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
                if time.monotonic() > deadline:
                    note(
                        self._label, f"{len(silent)} machines do not answer, but Ray does not call them dead"
                    )
                    break
                time.sleep(0.5)
            coordinator = get_or_create_autoscaling_coordinator()
            counted = coordinator.get_reserved_resources.remote(self._label, recompute=True)
            ray.get(counted, timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError as error:
            note(self._label, f"machines were not counted, so the restart may wait a minute more: {error}")


def answers(node: Mapping[str, Any]) -> bool:
    """Whether something listens where a machine's raylet does; ``node`` as of ``ray.nodes()``."""
    try:
        with socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_CONNECT_SECONDS
        ):
            return True
    except OSError:
        return False
