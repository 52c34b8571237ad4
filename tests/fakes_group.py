"""A gloo process group on this machine, without Ray."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(
    rank: int, world_size: int, port: int, function: Callable[..., Any], tasks: dict[str, Any], results: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu"
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    for name, task in tasks.items():
        results.put((name, rank, *function(task, rank, world_size)))
    dist.barrier()
    dist.destroy_process_group()


def run_processes(function: Callable[..., Any], tasks: dict[str, Any], world_size: int) -> dict[str, Any]:
    """What ``function(task, rank, world_size)`` returns on rank 0, by name of the task; it must be importable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, world_size, port, function, tasks, results))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=240) for _ in range(len(tasks) * world_size)]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    return {name: values for name, rank, *values in found if rank == 0}
