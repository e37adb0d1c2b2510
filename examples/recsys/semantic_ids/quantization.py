"""The result of a residual quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 14
"""Number of rows whose distances to all code vectors are in memory at once."""


@dataclass(frozen=True)
class Quantization:
    """Vectors, their codes, and the codebooks.

    Args:
        vectors: (N, d) quantized vectors; row j is item j + 1.
        codes: (N, levels) int64.
        codebooks: (levels, codebook_size, d).
    """

    vectors: Tensor
    codes: Tensor
    codebooks: Tensor

    def sums(self, codes: Tensor | None = None) -> Tensor:
        """Sums (N, d) of the code vectors of codes (N, levels); None for the codes of the items."""
        return code_vectors(self.codebooks, self.codes if codes is None else codes).sum(0)

    def last_level_distances(self) -> Tensor:
        """Squared distances of the residuals before the last level to each code vector of the last level.

        (N, codebook_size).
        """
        left = self.vectors - self.sums() + self.codebooks[-1][self.codes[:, -1]]
        return torch.cat([torch.cdist(rows, self.codebooks[-1]).square() for rows in left.split(CHUNK)])


def code_vectors(codebooks: Tensor, codes: Tensor) -> Tensor:
    """The vector of each code: (levels, K, d), (N, levels) -> (levels, N, d)."""
    return torch.stack([book[column] for book, column in zip(codebooks, codes.T, strict=True)])
