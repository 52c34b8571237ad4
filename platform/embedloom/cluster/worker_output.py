"""What workers print, as Ray brings it to the driver: our reports are shown, the rest is kept or printed.

Ray's log monitor sends all that a worker's process writes to its stdout and stderr, also from C, on any node.
``ray.init(log_to_driver=True)`` hangs a printer on the dispatcher of these lines, and here another takes its place, as
Ray's own progress bars do for notebooks. The dispatcher is not public: Ray is pinned to one minor version.
"""

import re
import time
from typing import Any

from embedloom.core.command_output import current_logs, worker_printed
from embedloom.core.progress import hear, note

_RAYS_PRINTER = "ray_print_logs"
_OURS = "embedloom"
# Of what the node's daemon says, what the user can do something about: memory and disks that are full.
_CONCERNS = re.compile(r"memory pressure|out of memory|OOM|No space left|out of disk|capacity", re.IGNORECASE)
_QUIET_SECONDS = 0.5  # the log monitor looks at its files ten times a second, less often where there are many
_SETTLE_SECONDS = 5.0
_last_line = 0.0


def listen() -> None:
    """Take the place of Ray's printer; after ``ray.init``, which ``ray.shutdown`` undoes."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    dispatcher.remove_handler(_RAYS_PRINTER)
    dispatcher.remove_handler(_OURS)
    dispatcher.add_handler(_OURS, heard)


def settle() -> None:
    """Wait until workers have said what they had to say: Ray brings it a moment after they have died."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    started = time.monotonic()
    while (now := time.monotonic()) < deadline and now - max(_last_line, started) < _QUIET_SECONDS:
        time.sleep(0.05)


def heard(batch: dict[str, Any]) -> None:
    """One process's lines, as Ray's log monitor found them: ``lines``, ``pid``, ``actor_name``, ``ip``, ..."""
    global _last_line
    _last_line = time.monotonic()
    logs = current_logs()
    if logs is None:
        _print(batch)
        return
    shown = concerns(batch)
    for line in shown:
        note("ray", line)
    # The autoscaler prints its whole state every five seconds.
    kept = shown if batch.get("pid") == "autoscaler" else batch["lines"]
    worker_printed(process_name(batch), kept, logs)


def concerns(batch: dict[str, Any]) -> list[str]:
    """Lines of Ray's daemons that concern the user: what the autoscaler does, and memory or disks that are full."""
    if batch.get("pid") == "autoscaler":
        from ray._private.worker import filter_autoscaler_events

        return list(filter_autoscaler_events(batch["lines"]))
    if batch.get("pid") == "raylet":
        return [line for line in batch["lines"] if _CONCERNS.search(line)]
    return []


def process_name(batch: dict[str, Any]) -> str:
    """``RayTrainWorker pid=123``, with the node's address where that is another."""
    pid = str(batch.get("pid"))
    if not pid.isdigit():
        return pid
    name = batch.get("actor_name") or batch.get("task_name") or "worker"
    elsewhere = batch.get("ip") not in (None, batch.get("localhost"))
    return f"{name} pid={pid}" + (f" ip={batch['ip']}" if elsewhere else "")


def _print(batch: dict[str, Any]) -> None:
    """As Ray prints them, with our reports as this process's own."""
    from ray._private.worker import print_to_stdstream

    if rest := [line for line in batch["lines"] if not hear(line)]:
        print_to_stdstream({**batch, "lines": rest}, ignore_prefix=False)
