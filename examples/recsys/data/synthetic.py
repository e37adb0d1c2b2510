"""Synthetic sequences, predictable from the order of the items not from their popularity; no download, no licence."""

from typing import Any

import torch
from torch import Tensor

from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.sequences import UserSequences


class SyntheticSequences(SequenceDataModule):
    """Users who walk around a ring of item clusters, each with a fixed stride.

    Each user draws a stride from 1 to ``num_strides``. The next item is ``stride`` clusters further, or with
    probability ``noise`` in a random cluster. Within a cluster the r-th item has a weight of 1 / r. So after the last
    item ``num_strides`` clusters are likely, and the last two items together tell which one. Popularity knows only the
    weights.

    Args:
        num_users: number of sequences.
        num_clusters: number of clusters on the ring; item ``i`` belongs to cluster ``(i - 1) % num_clusters``.
        items_per_cluster: number of items per cluster; the catalogue has ``num_clusters * items_per_cluster`` items.
        num_strides: number of strides.
        noise: probability of a jump to a random cluster.
        min_length: shortest sequence, at least 3.
        max_sequence_length: longest sequence; lengths are uniform in between.
        seed: seed of the sequences, independent of the global seed.
        **kwargs: arguments of :class:`SequenceDataModule`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_users: int = 2000,
        num_clusters: int = 50,
        items_per_cluster: int = 10,
        num_strides: int = 3,
        noise: float = 0.1,
        min_length: int = 5,
        max_sequence_length: int = 15,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_users", num_users), ("items_per_cluster", items_per_cluster)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        if not 1 <= num_strides < num_clusters:
            raise ValueError(f"num_strides must be from 1 to num_clusters - 1 = {num_clusters - 1}, got {num_strides}.")
        if not 0.0 <= noise <= 1.0:
            raise ValueError(f"noise must be a probability from 0 to 1, got {noise}.")
        if not 3 <= min_length <= max_sequence_length:
            raise ValueError(
                f"Lengths must obey 3 <= min_length <= max_sequence_length, got {min_length} and {max_sequence_length}."
            )
        self.num_users = num_users
        self.num_clusters = num_clusters
        self.items_per_cluster = items_per_cluster
        self.num_strides = num_strides
        self.noise = noise
        self.min_length = min_length
        self.max_sequence_length = max_sequence_length
        self.seed = seed

    @property
    def num_items(self) -> int:
        return self.num_clusters * self.items_per_cluster

    def load_sequences(self) -> UserSequences:
        generator = torch.Generator().manual_seed(self.seed)
        users, steps = self.num_users, self.max_sequence_length

        def draw(low: int, high: int, *size: int) -> Tensor:
            return torch.randint(low, high, size, generator=generator)

        stride = draw(1, self.num_strides + 1, users, 1)
        jumps = torch.rand(users, steps, generator=generator) < self.noise
        moves = torch.where(jumps, draw(0, self.num_clusters, users, steps), stride)
        moves[:, 0] = draw(0, self.num_clusters, users)
        clusters = moves.cumsum(1) % self.num_clusters
        weights = 1 / torch.arange(1, self.items_per_cluster + 1)
        within = torch.multinomial(weights, users * steps, replacement=True, generator=generator).view(users, steps)
        items = 1 + clusters + self.num_clusters * within

        lengths = draw(self.min_length, steps + 1, users)
        kept = torch.arange(steps) < lengths[:, None]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return UserSequences(items[kept], offsets, self.num_items)
