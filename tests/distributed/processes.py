"""Runs functions in several gloo processes on the loopback device, with a time limit.

Processes are forked off one that has imported what takes seconds, and has run nothing. The limit is far above what they
take, for machines on which other tests run beside them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing import start_processes

Worker = Callable[..., Any]
IMPORTED_ONCE = ["torch.distributed.fsdp", "lightning.pytorch", "torchmetrics", "pytest"]


def run(
    workers: Mapping[str, Worker], folder: Path, world_size: int = 2, limit: float = 240.0, args: tuple[Any, ...] = ()
) -> dict[str, list[Any]]:
    """Calls ``worker(rank, *args)`` for each worker, one after the other in the same processes.

    They have the environment variables that ``torchrun`` sets, so that a Trainer starts no others.

    Returns:
        What each worker returned, by rank.

    Raises:
        TimeoutError: if the ranks have not ended within ``limit`` seconds; they are killed first.
    """
    context = _forked(_main, (dict(workers), str(folder), world_size, limit, args), world_size)
    _ended(context, limit)
    by_rank = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]
    return {name: [results[name] for results in by_rank] for name in workers}


@contextlib.contextmanager
def spawned_by_fork_server(limit: float = 240.0) -> Iterator[None]:
    """Within it, processes that Lightning spawns are forked off the fork server instead.

    All that they are given is pickled, as to spawn them. Lightning's own ``start_method="forkserver"`` would not do:
    there, processes on the CPU share the memory of the weights, which both of them train.

    Raises:
        TimeoutError: where Lightning waits for them, as in :func:`run`.
    """

    def start(function: Worker, args: Any, nprocs: int, join: bool, start_method: str) -> mp.ProcessContext:
        assert (start_method, join) == ("spawn", False)
        context = _forked(function, args, nprocs)
        context.join = partial(_ended, context, limit)  # type: ignore[method-assign]
        return context

    with mock.patch.object(mp, "start_processes", start):
        yield


def _forked(function: Worker, args: Any, nprocs: int) -> mp.ProcessContext:
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    return start_processes(_on_loopback, (function, *args), nprocs, join=False, start_method="forkserver")


def _ended(context: mp.ProcessContext, limit: float) -> bool:
    """True, when all have; an error of one is raised, and the others are killed."""
    deadline = time.monotonic() + limit
    try:
        while not mp.ProcessContext.join(context, timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(context.processes)} processes did not end within {limit} s.")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return True


def _on_loopback(rank: int, function: Worker, *args: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    function(rank, *args)


def _main(
    rank: int, workers: dict[str, Worker], folder: str, world_size: int, limit: float, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        TORCHELASTIC_RUN_ID="tests", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", RANK=str(rank), LOCAL_RANK=str(rank),
        GROUP_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=limit),
    )
    try:
        torch.save({name: worker(rank, *args) for name, worker in workers.items()}, f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
