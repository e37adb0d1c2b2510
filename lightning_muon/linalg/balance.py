"""Division of the rows and columns of a matrix by their norms."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_muon.linalg.scale import check_matrices, largest_magnitude, normalized

BalanceOrder: TypeAlias = Literal["sequential", "simultaneous"]


@torch.no_grad()
def balance(
    matrices: Tensor,
    p: float = 2.0,
    exponent: float = 1.0,
    order: BalanceOrder = "sequential",
    sweeps: int = 1,
    *,
    overwrite: bool = False,
) -> Tensor:
    r"""Divide the rows and the columns of each matrix of a batch by a power :math:`a` of their p-norms.

    A sweep over :math:`X`, which starts as :math:`X / \|X\|_F`, is with ``order="sequential"``

    .. math::
        X_{ij} &\leftarrow X_{ij} / r_i^a, & r_i &= \|X_{i,:}\|_p \\
        X_{ij} &\leftarrow X_{ij} / c_j^a, & c_j &= \|X_{:,j}\|_p \quad\text{of the new } X

    and with ``order="simultaneous"`` :math:`X_{ij} \leftarrow X_{ij} / (r_i c_j)^a`, both norms of the same X, which
    treats rows and columns alike. With the defaults all columns end with norm 1; repeated sweeps of ``p=2``,
    ``exponent=1`` equalise the norms of the rows too (Sinkhorn's iteration, as in SinkGD, arXiv 2502.06742), and
    simultaneous ones of ``exponent=0.5`` likewise (Ruiz' equilibration).

    Signs are kept, and zero rows and columns stay zero: there is no epsilon. Line norms are taken after division by the
    line's largest entry, so that lines of very different sizes are all accurate.

    Args:
        matrices: floating-point tensor (..., m, n).
        p: order of the norms, from 1 to ``math.inf``.
        exponent: :math:`a`, above 0.
        order: ``"sequential"`` or ``"simultaneous"``.
        sweeps: how often.
        overwrite: the memory of ``matrices`` may be used, for the result too; their contents are undefined afterwards.

    Returns:
        Tensor (..., m, n) in the dtype of the input, computed in float32, or float64 for float64 input. The scale of
        the input does not matter. A zero matrix gives zero; one with NaN or infinity gives NaN and leaves the others
        of the batch alone.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if ``matrices`` is not floating point or has fewer than two dimensions.
    """
    check_balance(p, exponent, order, sweeps)
    check_matrices("balance", matrices)
    if matrices.numel() == 0:
        return matrices.clone()
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    x = normalized(stack, 1.0, torch.promote_types(stack.dtype, torch.float32), overwrite)
    spare = torch.empty_like(x)
    for _ in range(sweeps):
        rows = _divisor(x, 2, p, exponent, spare)
        if order == "sequential":
            x.div_(rows)
            x.div_(_divisor(x, 1, p, exponent, spare))
        else:
            columns = _divisor(x, 1, p, exponent, spare)
            x.div_(rows).div_(columns)
    return x.to(matrices.dtype).view(matrices.shape)


def check_balance(p: float, exponent: float, order: str, sweeps: int) -> None:
    """Raise ``ValueError`` for arguments that :func:`balance` cannot run."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not p >= 1:
        raise ValueError(f"p must be a number from 1 to infinity, got {p!r}.")
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)) or not 0 < exponent < math.inf:
        raise ValueError(f"exponent must be a number above 0, got {exponent!r}: 1 divides by the norms themselves.")
    if order not in get_args(BalanceOrder):
        raise ValueError(f"order must be one of {', '.join(get_args(BalanceOrder))}, got {order!r}.")
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 1:
        raise ValueError(f"sweeps must be an integer of at least 1, got {sweeps!r}.")


def _divisor(x: Tensor, dim: int, p: float, exponent: float, spare: Tensor) -> Tensor:
    """Norms along ``dim`` to the power ``exponent``, and 1 for zero lines. ``spare`` is as large as ``x``."""
    largest = largest_magnitude(x, dim)
    largest = torch.where(largest == 0, 1.0, largest)
    if math.isinf(p):
        return largest.pow_(exponent)
    # torch.linalg.vector_norm is several times slower on a CPU, but for p=2 along rows.
    norm = torch.div(x, largest, out=spare).abs_().pow_(p).sum(dim, keepdim=True).pow_(1 / p)
    return torch.where(norm == 0, 1.0, norm.mul_(largest)).pow_(exponent)
