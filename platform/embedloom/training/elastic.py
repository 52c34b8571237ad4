"""A worker group that goes on with fewer workers when machines are lost: what Ray Train needs to see it at once."""

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal.execution.callback import ControllerCallback

from embedloom.core.progress import note

_ANSWER_SECONDS = 10.0


class LostMachines(ControllerCallback):
    """Looks at the cluster's machines anew before a failed group is started again.

    Ray 2.60 counts machines every 20 seconds. A group that is started on an older count waits a minute for one that is
    gone (``RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S``) before it is tried with fewer workers.
    """

    def __init__(self, label: str) -> None:
        self._label = label

    def before_controller_execute_failure_decision(self, failure_decision: object) -> None:
        """Count the machines now."""
        try:
            coordinator = get_or_create_autoscaling_coordinator()
            counted = coordinator.get_reserved_resources.remote(self._label, recompute=True)
            ray.get(counted, timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError as error:
            note(self._label, f"machines were not counted, so the restart may wait a minute more: {error}")
