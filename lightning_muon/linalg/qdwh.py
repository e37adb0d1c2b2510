"""The polar factor by the QR-based dynamically weighted Halley iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muon.linalg.newton_schulz import exact_products, newton_schulz

_QR_ABOVE = 100.0  # condition number up to which a Cholesky factorization is accurate enough
_CLOSING = (0.0, 2.5, -1.5)  # 0 and 1 are fixed points with slope 0: values near 0 vanish


@exact_products()
def qdwh(x: Tensor, steps: int | None = None) -> Tensor:
    r"""The polar factor of a stack of matrices with singular values in [0, 1].

    A step applies the rational function :math:`\sigma (a + b\sigma^2) / (1 + c\sigma^2)` to the singular values. Its
    weights are the best for values from a lower bound :math:`\ell` to 1:

    .. math::
        d &= \sqrt[3]{4 (1 - \ell^2) / \ell^4}, \qquad
        a = \sqrt{1 + d} + \tfrac12 \sqrt{8 - 4d + 8 (2 - \ell^2) / (\ell^2 \sqrt{1 + d})}, \\
        b &= (a - 1)^2 / 4, \qquad c = a + b - 1, \qquad
        \ell \leftarrow \ell\, (a + b\ell^2) / (1 + c\ell^2), \\
        X &\leftarrow \tfrac bc X + (a - \tfrac bc) (I + c XX^\top)^{-1} X .

    With c > 100 the inverse is taken by the QR factorization of :math:`[\sqrt c\, X, I]^\top`, else by Cholesky. The
    bound starts at :math:`\epsilon^{2/3}` (2.4e-5 in float32, 3.7e-11 in float64) whatever the matrix, so that the
    weights are the same for a whole batch and known in advance. From there on singular values become 1. Those of
    rounding errors, which come out far below 1, are removed when the bound has reached 1 by
    :math:`\tfrac52 \sigma^3 - \tfrac32 \sigma^5`.

    Source: Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31 (2010); bound and last polynomial are ours.

    Products are computed in float32 even where ``torch.set_float32_matmul_precision`` allows less: their errors are
    not contracted later as those of Newton-Schulz iterations are.

    Memory beside ``x``, at most: as much again and two matrices of the shorter side. On CUDA the QR factorizations of
    a batch run one after the other.

    Args:
        x: contiguous and finite (B, m, n) in float32 or float64; overwritten.
        steps: number of iterations; None until the bound is 1 to rounding: 4 in float32, 5 in float64.
    """
    wide = x.mT if x.shape[1] > x.shape[2] else x
    rounding = torch.finfo(x.dtype).eps
    lowest = rounding ** (2 / 3)
    done = 0
    while done < steps if steps is not None else 1 - lowest > rounding:
        a, b, c = _weights(lowest)
        if c > _QR_ABOVE:
            _halley_by_qr(wide, a, b, c)
        else:
            _halley_by_cholesky(wide, a, b, c)
        lowest = min(1.0, lowest * (a + b * lowest**2) / (1 + c * lowest**2))
        done += 1
    return x if 1 - lowest > rounding else newton_schulz(x, [_CLOSING])


def _weights(lowest: float) -> tuple[float, float, float]:
    d = math.cbrt(4 * (1 - lowest**2) / lowest**4)
    root = math.sqrt(1 + d)
    a = root + math.sqrt(8 - 4 * d + 8 * (2 - lowest**2) / (lowest**2 * root)) / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def _halley_by_qr(wide: Tensor, a: float, b: float, c: float) -> None:
    batch, m, n = wide.shape
    stacked = wide.new_zeros(batch, m, n + m)
    torch.mul(wide, math.sqrt(c), out=stacked[:, :, :n])
    stacked[:, :, n:].diagonal(dim1=1, dim2=2).fill_(1.0)
    columns, tau = stacked.mT, wide.new_empty(batch, m)  # in the memory order of LAPACK, which then works in place
    torch.geqrf(columns, out=(columns, tau))
    torch.linalg.householder_product(columns, tau, out=columns)
    wide.baddbmm_(stacked[:, :, n:].mT, stacked[:, :, :n], beta=b / c, alpha=(a - b / c) / math.sqrt(c))


def _halley_by_cholesky(wide: Tensor, a: float, b: float, c: float) -> None:
    solved = torch.cholesky_solve(wide, torch.linalg.cholesky_ex(_one_plus_gram(wide, c)).L)
    wide.mul_(b / c).add_(solved, alpha=a - b / c)


def _one_plus_gram(wide: Tensor, c: float) -> Tensor:
    gram = torch.bmm(wide, wide.mT).mul_(c)
    gram.diagonal(dim1=1, dim2=2).add_(1.0)
    return gram
