"""Matrices with given singular values."""

from __future__ import annotations

import torch
from torch import Tensor


def with_spectrum(m: int, n: int, spectrum: Tensor) -> Tensor:
    """A random (m, n) matrix in float64 with these singular values, at most min(m, n) of them."""
    u = torch.linalg.qr(torch.randn(m, len(spectrum), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, len(spectrum), dtype=torch.float64)).Q
    return (u * spectrum.double()) @ v.T


def _cases() -> dict[str, Tensor]:
    """Matrices in float64."""
    return {
        "tall": torch.randn(40, 12, dtype=torch.float64),
        "wide": torch.randn(9, 33, dtype=torch.float64),
        "square": torch.randn(17, 17, dtype=torch.float64),
        "offset": torch.randn(20, 30, dtype=torch.float64) + 2.0,
        "one row": torch.randn(1, 13, dtype=torch.float64),
        "one column": torch.randn(11, 1, dtype=torch.float64),
        "one number": torch.tensor([[-2.5]], dtype=torch.float64),
        "rank 4 of 10": torch.randn(10, 4, dtype=torch.float64) @ torch.randn(4, 25, dtype=torch.float64),
        "rank one": torch.outer(torch.randn(14), torch.randn(8)).double(),
        "zero": torch.zeros(6, 9, dtype=torch.float64),
        "zero row": torch.cat([torch.randn(5, 8), torch.zeros(1, 8)]).double(),
        "orthogonal": with_spectrum(16, 16, torch.ones(16)),
        "orthogonal, tall": with_spectrum(30, 10, torch.full((10,), 3.0)),
        "graded": with_spectrum(12, 20, 10.0 ** -torch.arange(12.0, dtype=torch.float64)),
        "repeated": with_spectrum(24, 12, torch.tensor([3.0] * 4 + [2.0] * 4 + [0.5] * 4)),
        "two apart": with_spectrum(15, 15, torch.tensor([5.0, 1.0])),
    }


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(7)
    CASES = _cases()
