"""How good a quantization is over all items: reconstruction, use of the codebooks, collisions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from examples.recsys.semantic_ids.codes import SemanticIds


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
