"""Runs functions in several gloo processes on the loopback device, with a time limit.

The limit is far above the usual time, for machines on which other tests run at the same time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Worker = Callable[..., Any]
IMPORTED_ONCE = ["torch.distributed.fsdp", "lightning.pytorch", "torchmetrics", "pytest"]


def run(
    workers: Mapping[str, Worker], folder: Path, world_size: int = 2, limit: float = 240.0, args: tuple[Any, ...] = ()
) -> dict[str, list[Any]]:
    """Calls ``worker(rank, *args)`` for each worker, one after the other in the same processes.

    Returns:
        What each worker returned, by rank.

    Raises:
        TimeoutError: if the ranks have not ended within ``limit`` seconds; they are killed first.
    """
    # Processes are forked off one that has imported what takes seconds, and has run nothing.
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    context = mp.start_processes(
        _main,
        args=(dict(workers), str(folder), world_size, limit, args),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{', '.join(workers)} did not end on all {world_size} ranks within {limit} s.")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    by_rank = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]
    return {name: [results[name] for results in by_rank] for name in workers}


def command(words: Sequence[str], folder: Path, limit: float = 240.0) -> str:
    """Runs a command that may start processes of its own, and returns what it printed.

    Raises:
        RuntimeError: with the end of its messages, if it fails.
        subprocess.TimeoutExpired: if it has not ended within ``limit`` seconds; all its processes are killed first.
    """
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(folder)}
    started = subprocess.Popen(
        words, cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, messages = started.communicate(timeout=limit)
    except BaseException:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    if started.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {started.returncode}: {messages[-2000:]}")
    return printed


def _main(
    rank: int, workers: dict[str, Worker], folder: str, world_size: int, limit: float, args: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
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
