"""Full-ranking metrics for one relevant item a sample: Recall@K and NDCG@K from the rank of the target.

The rank is counted, not sorted, so nothing but two sums is kept; torchmetrics' retrieval metrics give the same values
but store every score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def target_ranks(scores: Tensor, targets: Tensor, exclude: Tensor | None = None) -> Tensor:
    """Rank of each target among all columns of its row, 1 for the best.

    Ties, and scores that are NaN, are resolved against the model: a column that is not strictly below the target stands
    before it.

    Args:
        scores: (B, N), higher is better.
        targets: (B,) columns in [0, N).
        exclude: (B, S) columns taken out of the ranking, such as the items already seen; -1 fills shorter rows.
            A target is ranked even where it is listed.

    Returns:
        (B,) ranks in [1, N], int64.

    Raises:
        ValueError: if the shapes do not fit together or an index is outside of [0, N).

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

    With one relevant item the ideal DCG is 1, so this is the normalised gain.
    """
    return recall_at_k(ranks, k) / torch.log2(ranks.float() + 1)


class RankMetric(Metric):
    """Mean over all samples of a value of the target's rank; sums over processes, so uneven shares weigh right.

    Args:
        k: how many of the first recommendations count.

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
        """What one sample counts: (B,) ranks -> (B,)."""
        raise NotImplementedError

    def update(self, ranks: Tensor) -> None:
        """Add a batch of ranks (B,), 1 for the best, from :func:`target_ranks`."""
        # Not in place: `Trainer.validate` resets in inference mode, and a `fit` could not change what that leaves.
        self.total = self.total + self.value(ranks).sum()
        self.count = self.count + ranks.numel()

    def compute(self) -> Tensor:
        """The mean over all samples of all processes; NaN where there was none."""
        return self.total / self.count


class Recall(RankMetric):
    """Share of samples whose target is among the first ``k`` (the hit rate, as there is one target)."""

    def value(self, ranks: Tensor) -> Tensor:
        return recall_at_k(ranks, self.k)


class NDCG(RankMetric):
    """Normalised discounted cumulative gain at ``k`` with one relevant item a sample."""

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
