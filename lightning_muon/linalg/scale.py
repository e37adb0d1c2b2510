"""Scaling of stacks of matrices to a common norm, whatever the size of their entries."""

from __future__ import annotations

import torch
from torch import Tensor


def check_matrices(caller: str, matrices: Tensor) -> None:
    """Raise ``TypeError`` unless ``matrices`` are floating-point matrices (..., m, n)."""
    if not matrices.is_floating_point() or matrices.ndim < 2:
        shape = tuple(matrices.shape)
        raise TypeError(f"{caller} takes floating-point matrices (..., m, n), got {matrices.dtype} of shape {shape}.")


def normalized(stack: Tensor, safety: float, dtype: torch.dtype, overwrite: bool = False) -> Tensor:
    """A contiguous stack X / (safety ||X||_F) in ``dtype``, right for entries of any size; zero for zero.

    Args:
        stack: (B, m, n).
        safety: extra divisor.
        dtype: of the result; the division happens in float32, or float64 for a float64 stack.
        overwrite: the memory of ``stack`` may be used, for the result too.
    """
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32)).contiguous()
    owned = overwrite or wide is not stack
    norm = torch.linalg.vector_norm(wide.flatten(1), dim=1)
    if not _all_moderate(norm):
        # Squares of entries below 1e-19 vanish in float32 and those above 1e19 overflow. Multiplying by a power of two
        # that brings the largest entry into [0.5, 1) first rounds nothing, so that both ways give the same bits.
        largest = largest_magnitude(wide.flatten(1), 1).squeeze(1)
        bound = 1022 if wide.dtype == torch.float64 else 126  # beyond it the power of two is not representable
        exponent = torch.frexp(largest).exponent.clamp_(-bound, bound).to(wide.dtype)
        power = torch.ldexp(torch.ones_like(exponent), -exponent)[:, None, None]
        wide = torch.mul(wide, power, out=wide if owned else torch.empty_like(wide))
        owned = True
        norm = torch.linalg.vector_norm(wide.flatten(1), dim=1).clamp_(min=0.5)  # acts on zero, and on denormals
    in_place = owned and dtype == wide.dtype
    return torch.div(
        wide, norm.mul_(safety)[:, None, None], out=wide if in_place else torch.empty_like(wide, dtype=dtype)
    )


def largest_magnitude(x: Tensor, dim: int) -> Tensor:
    """Largest |x| along a dimension, which is kept with size 1; without the copy that ``x.abs()`` makes."""
    return torch.maximum(x.amax(dim, keepdim=True), x.amin(dim, keepdim=True).neg_())


def _all_moderate(norm: Tensor) -> bool:
    """Whether no square vanished or overflowed; answered only where that takes no synchronization."""
    return norm.device.type == "cpu" and float(norm.min()) > 1e-12 and float(norm.max()) < 1e12
