"""The order in which samples are taken, and how processes share them out."""

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
    """A random order in which the samples of a batch have about the same length, so that little of it is padding.

    Samples are shuffled and cut into pools of ``pool_size`` batches; each pool is sorted by length and cut into
    batches, and all batches are shuffled. Every sample comes once an epoch. An incomplete batch comes last.

    Of several processes each takes its part of one order, so that their batches of a step are alike in length too; a
    few samples come twice where the processes would else have unequal numbers. The order is decided by the epoch and
    the seed that ``seed_everything`` leaves in the environment (0 if it was not called). A Trainer, which would shuffle
    the order of any other sampler again, leaves one that shares out as it is.

    Args:
        lengths: of the samples.
        batch_size: of the loader, which is that of a process.
        num_replicas: processes that share the order out.
        rank: which of them this is, from 0.
        pool_size: batches a pool; the more, the more alike the lengths and the less random the batches.

    Raises:
        ValueError: if ``batch_size`` or ``pool_size`` is below 1, or ``rank`` is not among the processes.
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
        """The order of the epoch that ``set_epoch`` said; without a word it is the one after the last."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        complete = len(self.lengths) - len(self.lengths) % self.step_size
        order = torch.randperm(len(self.lengths), generator=generator)
        pools = order[:complete].split(self.pool_size * self.step_size)
        steps = torch.cat([pool[self.lengths[pool].argsort()] for pool in pools]).view(-1, self.step_size)
        steps = steps[torch.randperm(len(steps), generator=generator)]
        order = torch.cat([steps.flatten(), order[complete:]])
        # The first come again until all processes have as many.
        order = order[torch.arange(self.total_size) % len(order)]
        yield from order[self.rank :: self.num_replicas].tolist()


def evaluation_sampler(dataset: Dataset[Any], trainer: Trainer | None) -> Sampler[int] | None:
    """What gives each of several processes its part of a data set, in order, and no sample twice; None for one alone.

    The sampler that Lightning would insert repeats samples to even out the processes, and they would count twice.
    """
    if trainer is None or trainer.world_size == 1:
        return None
    return UnrepeatedDistributedSampler(
        dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
    )
