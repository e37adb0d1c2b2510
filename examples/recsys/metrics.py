"""Full-ranking metrics with one relevant item per sample: Recall@K and NDCG@K from the rank of the target.

The rank comes from counting, not from sorting, so the state of a metric is two sums. The retrieval metrics of
torchmetrics give the same values but store every score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def target_ranks(scores: Tensor, targets: Tensor, exclude: Tensor | None = None) -> Tensor:
    """Compute the rank of each target among all columns of its row, 1 for the best.

    Ties and NaN scores count against the model: a column ranks before the target unless its score is strictly lower.

    Args:
        scores: (B, N), higher is better.
        targets: (B,) columns in [0, N).
        exclude: (B, S) columns left out of the ranking, such as items already seen; -1 fills shorter rows. A target
            that is listed here is ranked all the same.

    Returns:
        (B,) ranks in [1, N], int64.

    Raises:
        ValueError: if the shapes do not match or an index is outside [0, N).

    Example::

        >>> target_ranks(torch.tensor([[0.3, 0.9, 0.3]]), torch.tensor([0]))
        tensor([3])
        >>> target_ranks(torch.tensor([[0.3, 0.9, 0.3]]), torch.tensor([0]), exclude=torch.tensor([[1, -1]]))
        tensor([2])
    """
    _check_shapes(scores, targets, exclude)
    columns = targets[:, None]
    before = ~(scores < scores.gather(1, columns))
    before.scatter_(1, columns, False)
    if exclude is not None:
        before.scatter_(1, torch.where(exclude >= 0, exclude, columns), False)
    return before.sum(1) + 1


def recall_at_k(ranks: Tensor, k: int) -> Tensor:
    """1 where the target is among the first ``k``, else 0: (B,) ranks from 1 -> (B,) float32."""
    return (ranks <= k).float()


def ndcg_at_k(ranks: Tensor, k: int) -> Tensor:
    """``1 / log2(1 + rank)`` where the target is among the first ``k``, else 0: (B,) ranks from 1 -> (B,) float32.

    With one relevant item the ideal DCG is 1, so this is the normalized gain.
    """
    return recall_at_k(ranks, k) / torch.log2(ranks.float() + 1)


class RankMetric(Metric):
    """Mean over all samples of a function of the target's rank.

    Processes add up sums and counts, so the mean is exact when they have different numbers of samples.

    Args:
        k: number of top recommendations that count.

    Raises:
        ValueError: if ``k`` is below 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, k: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}.")
        self.k = k
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def value(self, ranks: Tensor) -> Tensor:
        """Value of each sample: (B,) ranks -> (B,)."""
        raise NotImplementedError

    def update(self, ranks: Tensor) -> None:
        """Add a batch of ranks (B,), 1 for the best, from :func:`target_ranks`."""
        # Not in place: `Trainer.validate` resets in inference mode; a later `fit` cannot modify inference tensors.
        self.total = self.total + self.value(ranks).sum()
        self.count = self.count + ranks.numel()

    def compute(self) -> Tensor:
        """Mean over all samples of all processes; NaN if there are none."""
        return self.total / self.count


class Recall(RankMetric):
    """Share of samples whose target is among the first ``k`` (the hit rate, as there is one target)."""

    def value(self, ranks: Tensor) -> Tensor:
        return recall_at_k(ranks, self.k)


class NDCG(RankMetric):
    """Normalized discounted cumulative gain at ``k`` with one relevant item per sample."""

    def value(self, ranks: Tensor) -> Tensor:
        return ndcg_at_k(ranks, self.k)


def _check_shapes(scores: Tensor, targets: Tensor, exclude: Tensor | None) -> None:
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"Scores must be (B, N) and targets (B,), got {tuple(scores.shape)} and {tuple(targets.shape)}."
        )
    if exclude is not None and (exclude.ndim != 2 or len(exclude) != len(scores)):
        raise ValueError(f"exclude must be ({len(scores)}, S) to fit the scores, got {tuple(exclude.shape)}.")
    for name, index, lowest in (("targets", targets, 0), ("exclude", exclude, -1)):
        if index is not None and index.numel() and not (lowest <= index.min() and index.max() < scores.shape[1]):
            raise ValueError(
                f"{name} must hold columns from {lowest} to {scores.shape[1] - 1}, "
                f"got values from {index.min()} to {index.max()}."
            )
