"""How good a quantization is over all items: reconstruction, use of the codebooks, collisions."""

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
"""Codes that explain less than this share of what RQ-k-means of the same size explains are called poor."""

LEAST_EXPLAINED = 0.1
"""Codes that explain less than this are called poor whatever k-means reaches."""


class QuantizationQuality(Metric):
    """What items lose as codes, over all batches and processes.

    ``compute`` returns, as scalars: ``reconstruction``, the mean squared error of a feature; ``explained``, one minus
    its ratio to the variance of the features; ``use_1``, ``use_2``, ... the share of the codebook that occurs, a level;
    ``collisions``, how many items share all their codes with another.

    Args:
        num_features: width D of the features.
        codebook_size: codes a level.
        **kwargs: of ``torchmetrics.Metric``.
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
        # Not in place: a state that was reset in inference mode can not be changed out of it.
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
    """One number by which fewer collisions are better, and of as many a larger explained share: scalar float64.

    With e, the share of the variance that is not explained, it is the collisions and e / (1 + e). Float32 would have no
    digits left for the fraction.
    """
    unexplained = 1 - quality["explained"].cpu().double()
    return quality["collisions"].cpu().double() + 1 - 1 / (1 + unexplained)


def kmeans_explained(features: Tensor, levels: int, codebook_size: int, max_items: int = 1 << 13) -> float:
    """The share of the variance that RQ-k-means explains, in 5 iterations a level, of at most so many items.

    A yardstick that takes seconds, and is within a few percent of what all items and iterations give.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(features), generator=generator)[:max_items]
    features = features[sample.to(features.device)]
    codes, codebooks = residual_kmeans(features, levels, codebook_size, max_iterations=5)
    left = features - code_vectors(codebooks, codes).sum(0)
    return 1 - float(left.square().sum() / (features - features.mean(0)).square().sum())


def complaint(explained: float, kmeans: float) -> str | None:
    """What is wrong with codes that explain too little, beside what RQ-k-means explains; None if they do not.

    An RQ-VAE that was trained explains most of what RQ-k-means does (0.90 of it on Amazon Beauty), and one that was
    hardly trained less than half (0.46 after 5 of 60 epochs there). Where both explain next to nothing, the features
    are too many and too different for as many codes.
    """
    if explained < SHARE_OF_KMEANS * kmeans:
        return (
            f"explain {explained:.1%} of the variance of the features, less than half of the {kmeans:.1%} that "
            "RQ-k-means of as many levels and codes explains, so that items with like codes need not be alike"
        )
    if explained < LEAST_EXPLAINED:
        return f"explain {explained:.1%} of the variance of the features, so that they say next to nothing of an item"
    return None
