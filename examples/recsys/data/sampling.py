"""The order in which samples are taken, and how processes share them out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import Dataset, Sampler


class LengthGroupedSampler(Sampler[int]):
    """A random order in which the samples of a batch have about the same length, so that little of it is padding.

    Samples are shuffled and cut into pools of ``pool_size`` batches; each pool is sorted by length and cut into
    batches, and all batches are shuffled. Every sample comes once an epoch. An incomplete batch comes last.

    All processes have the same order, decided by the epoch and the seed that ``seed_everything`` leaves in the
    environment (0 if it was not called), as with the sampler that Lightning inserts.

    Args:
        lengths: of the samples.
        batch_size: of the loader, times the processes that share the order out.
        pool_size: batches a pool; the more, the more alike the lengths and the less random the batches.

    Raises:
        ValueError: if ``batch_size`` or ``pool_size`` is below 1.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, pool_size: int = 50) -> None:
        for name, value in (("batch_size", batch_size), ("pool_size", pool_size)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.pool_size = pool_size
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next order is for; without a word it is the one after the last."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        complete = len(self) - len(self) % self.batch_size
        order = torch.randperm(len(self), generator=generator)
        pools = order[:complete].split(self.pool_size * self.batch_size)
        batches = torch.cat([pool[self.lengths[pool].argsort()] for pool in pools]).view(-1, self.batch_size)
        yield from batches[torch.randperm(len(batches), generator=generator)].flatten().tolist()
        yield from order[complete:].tolist()


def evaluation_sampler(dataset: Dataset[Any], trainer: Trainer | None) -> Sampler[int] | None:
    """What gives each of several processes its part of a data set, in order, and no sample twice; None for one alone.

    The sampler that Lightning would insert repeats samples to even out the processes, and they would count twice.
    """
    if trainer is None or trainer.world_size == 1:
        return None
    return UnrepeatedDistributedSampler(
        dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
    )
