"""Quality of a quantization over all items: reconstruction, use of the codebooks, collisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from examples.recsys.semantic_ids.codes import SemanticIds
from examples.recsys.semantic_ids.kmeans import residual_kmeans
from examples.recsys.semantic_ids.quantization import code_vectors

SHARE_OF_KMEANS = 0.5
"""Codes are poor if they explain less than this share of the variance that RQ-k-means of the same size explains."""

LEAST_EXPLAINED = 0.1
"""Codes are also poor if they explain less than this share of the variance."""


class QuantizationQuality(Metric):
    """Quality of the codes of items, over all batches and processes.

    ``compute`` returns these scalars: ``reconstruction``, the mean squared error of a feature; ``explained``, one minus
    its ratio to the variance of the features; ``use_1``, ``use_2``, ..., the share of a level's codebook that occurs;
    ``collisions``, the number of items that share all their codes with another.

    Args:
        num_features: width D of the features.
        codebook_size: number of codes per level.
        **kwargs: arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    count: Tensor
    error: Tensor
    squares: Tensor
    sums: Tensor
    codes: list[Tensor]

    def __init__(self, num_features: int, codebook_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.codebook_size = codebook_size
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("error", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("squares", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(num_features), dist_reduce_fx="sum")
        self.add_state("codes", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, reconstruction: Tensor, codes: Tensor) -> None:
        """Add items: features and their reconstruction (B, D), codes (B, levels)."""
        features = features.float()  # half precision has too few digits for sums over items
        # Not in place: a state that was reset in inference mode cannot be modified outside it.
        self.count = self.count + len(features)
        self.error = self.error + (reconstruction - features).square().sum()
        self.squares = self.squares + features.square().sum()
        self.sums = self.sums + features.sum(0)
        self.codes.append(codes)

    def compute(self) -> dict[str, Tensor]:
        ids = SemanticIds(dim_zero_cat(self.codes))
        variance = self.squares - self.sums.square().sum() / self.count
        uses = [len(level.unique()) / self.codebook_size for level in ids.codes.T]
        return {
            "reconstruction": self.error / (self.count * len(self.sums)),
            "explained": 1 - self.error / variance,
            **{f"use_{level}": torch.tensor(use) for level, use in enumerate(uses, start=1)},
            "collisions": torch.tensor(float(ids.collisions())),
        }


def collisions_and_error(quality: Mapping[str, Tensor]) -> Tensor:
    """A value to minimize: the number of collisions, and for equal numbers the unexplained share. Scalar float64.

    It is the number of collisions plus e / (1 + e), where e is the share of the variance that is not explained. Float32
    would have no digits left for the fraction.
    """
    unexplained = 1 - quality["explained"].cpu().double()
    return quality["collisions"].cpu().double() + 1 - 1 / (1 + unexplained)


def kmeans_explained(features: Tensor, levels: int, codebook_size: int, max_items: int = 1 << 13) -> float:
    """The share of the variance that RQ-k-means explains after 5 iterations per level, on at most ``max_items`` items.

    It takes seconds, and is within a few percent of the value with all items and iterations.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(features), generator=generator)[:max_items]
    features = features[sample.to(features.device)]
    codes, codebooks = residual_kmeans(features, levels, codebook_size, max_iterations=5)
    left = features - code_vectors(codebooks, codes).sum(0)
    return 1 - float(left.square().sum() / (features - features.mean(0)).square().sum())


def complaint(explained: float, kmeans: float) -> str | None:
    """Say why codes are poor, given the shares of the variance that they and RQ-k-means explain; None if they are not.

    A trained RQ-VAE explains most of what RQ-k-means explains (0.90 of it on Amazon Beauty). An RQ-VAE after little
    training explains less than half (0.46 after 5 of 60 epochs there). If both explain almost nothing, the features are
    too many and too different for this number of codes.
    """
    if explained < SHARE_OF_KMEANS * kmeans:
        return (
            f"explain {explained:.1%} of the variance of the features, less than half of the {kmeans:.1%} that "
            "RQ-k-means with the same levels and codebook size explains, so items with similar codes may not be similar"
        )
    if explained < LEAST_EXPLAINED:
        return f"explain {explained:.1%} of the variance of the features, so they say almost nothing about an item"
    return None
