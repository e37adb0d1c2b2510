"""Samplers: the order of the samples, and their distribution over processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler


class LengthGroupedSampler(DistributedSampler[Any]):
    """A random order in which the samples of a batch have about the same length, which saves padding.

    Samples are shuffled and split into pools of ``pool_size`` batches. Each pool is sorted by length and split into
    batches, and all batches are shuffled. Every sample comes once per epoch. An incomplete batch comes last.

    All processes share one order, so their batches of a step have similar lengths too. A few samples come twice if the
    number of samples does not divide evenly. The order depends on the epoch and on the seed that ``seed_everything``
    leaves in the environment (0 if it was not called). The base class is ``DistributedSampler``, since a Trainer would
    shuffle the order of any other sampler again.

    Args:
        lengths: lengths of the samples.
        batch_size: batch size of the loader, per process.
        num_replicas: number of processes.
        rank: rank of this process, from 0.
        pool_size: number of batches per pool. Larger pools give more similar lengths and less random batches.

    Raises:
        ValueError: if ``batch_size`` or ``pool_size`` is below 1, or ``rank`` is not below ``num_replicas``.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0, pool_size: int = 50
    ) -> None:
        for name, value in (("batch_size", batch_size), ("pool_size", pool_size)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        super().__init__(lengths, num_replicas, rank, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)))
        self.lengths = torch.as_tensor(lengths)
        self.step_size = batch_size * num_replicas
        self.pool_size = pool_size

    def __iter__(self) -> Iterator[int]:
        """The order of the epoch from ``set_epoch``; without such a call each iteration is the next epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        complete = len(self.lengths) - len(self.lengths) % self.step_size
        order = torch.randperm(len(self.lengths), generator=generator)
        pools = order[:complete].split(self.pool_size * self.step_size)
        steps = torch.cat([pool[self.lengths[pool].argsort()] for pool in pools]).view(-1, self.step_size)
        steps = steps[torch.randperm(len(steps), generator=generator)]
        order = torch.cat([steps.flatten(), order[complete:]])
        # Repeat the first samples so that all processes have the same number.
        order = order[torch.arange(self.total_size) % len(order)]
        yield from order[self.rank :: self.num_replicas].tolist()


def evaluation_sampler(dataset: Dataset[Any], trainer: Trainer | None) -> Sampler[int] | None:
    """Return a sampler that splits a data set over processes, in order and without repeats; None for one process.

    The sampler that Lightning would insert repeats samples to even out the processes, and metrics would count these
    twice.
    """
    if trainer is None or trainer.world_size == 1:
        return None
    return UnrepeatedDistributedSampler(
        dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
    )
