"""What a residual quantizer made of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 14
"""Rows whose distances to all code vectors are held at once."""


@dataclass(frozen=True)
class Quantization:
    """Vectors and the codes that stand for them, with the codebooks that the codes point into.

    Args:
        vectors: (N, d) what was quantized; row j is item j + 1.
        codes: (N, levels) int64.
        codebooks: (levels, codebook_size, d).
    """

    vectors: Tensor
    codes: Tensor
    codebooks: Tensor

    def sums(self, codes: Tensor | None = None) -> Tensor:
        """What codes (N, levels) stand for, the items' own if None: the sum of their code vectors, (N, d)."""
        return code_vectors(self.codebooks, self.codes if codes is None else codes).sum(0)

    def last_level_distances(self) -> Tensor:
        """Squared distance of what the levels before the last leave to each code vector of the last.

        (N, codebook_size).
        """
        left = self.vectors - self.sums() + self.codebooks[-1][self.codes[:, -1]]
        return torch.cat([torch.cdist(rows, self.codebooks[-1]).square() for rows in left.split(CHUNK)])


def code_vectors(codebooks: Tensor, codes: Tensor) -> Tensor:
    """The vector of each code: (levels, K, d), (N, levels) -> (levels, N, d)."""
    return torch.stack([book[column] for book, column in zip(codebooks, codes.T, strict=True)])
