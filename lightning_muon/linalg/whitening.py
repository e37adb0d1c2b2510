"""Whitening by a Newton-Schulz iteration: makes the rows of a matrix uncorrelated and of equal size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muon.linalg.newton_schulz import newton_schulz
from lightning_muon.linalg.scale import check_matrices, normalized


@torch.no_grad()
def whiten(matrices: Tensor, beta: float = 0.5, steps: int = 10, *, overwrite: bool = False) -> Tensor:
    r"""Approximately :math:`(XX^\top)^{-1/2} X`, for each matrix X of a batch; tall ones :math:`X (X^\top X)^{-1/2}`.

    The coupled Newton-Schulz iteration for the inverse square root starts from :math:`X / \|X\|_F` with
    :math:`Y_0 = XX^\top` and :math:`Z_0 = I`,

    .. math::
        Y_{k+1} = \beta\, Y_k (3I - Z_k Y_k), \qquad Z_{k+1} = \beta\, (3I - Z_k Y_k) Z_k,

    and returns :math:`P_k = Z_k X`. All its matrices commute, so :math:`Z_k Y_k = P_k P_k^\top`. Therefore
    :math:`P_{k+1} = \beta (3I - P_k P_k^\top) P_k` is computed, which gives the same result. In the coupled form
    rounding can make :math:`Z_k Y_k` indefinite, and the iteration then diverges if X is rank-deficient.

    With :math:`\beta = 1/2` the singular values converge to 1, from below: those of :math:`X / \|X\|_F` grow by 1.5 a
    step while small, so that 10 steps bring 0.04 to 0.99, and 30 steps 1e-5. With :math:`\beta = 0.8`, as
    in implementations of SWAN (arXiv 2412.13148), they grow by 2.4, but do not converge: after 10 steps those from
    0.001 on lie between 0.56 and 1.60.

    Args:
        matrices: floating-point tensor (..., m, n).
        beta: step of the iteration, above 0 and at most 0.866; above it singular values would change sign.
        steps: number of iterations.
        overwrite: the memory of ``matrices`` may be used, for the result too; their contents are undefined afterwards.

    Returns:
        Tensor (..., m, n) in the dtype of the input, computed in float32, or float64 for float64 input. The scale of
        the input does not matter. A zero matrix gives zero; one with NaN or infinity gives NaN and leaves the others
        of the batch alone.

    Raises:
        ValueError: if ``beta`` or ``steps`` is out of range.
        TypeError: if ``matrices`` is not floating point or has fewer than two dimensions.
    """
    check_whitening(beta, steps)
    check_matrices("whiten", matrices)
    if matrices.numel() == 0:
        return matrices.clone()
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    x = normalized(stack, 1.0, torch.promote_types(stack.dtype, torch.float32), overwrite)
    return newton_schulz(x, [(3 * beta, -beta, 0.0)] * steps).to(matrices.dtype).view(matrices.shape)


def check_whitening(beta: float, steps: int) -> None:
    """Raise ``ValueError`` for arguments that :func:`whiten` cannot run."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta <= math.sqrt(3) / 2:
        raise ValueError(f"beta must be above 0 and at most 0.866, got {beta!r}: 0.5 converges to the polar factor.")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 100:
        raise ValueError(f"Whitening steps must be an integer from 1 to 99, got {steps!r}.")
