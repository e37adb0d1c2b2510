"""SWAN (arXiv 2412.13148) and SinkGD (arXiv 2502.06742): rules without state."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim.references.common import Case, Reference, divide


class SWAN(Reference):
    """Rows standardised, whitened by coupled Newton-Schulz, brought back to the norm before whitening."""

    defaults: ClassVar[dict[str, Any]] = {"weight_decay": 0.0, "rms": 0.2, "beta": 0.8, "steps": 10}
    # With beta=0.8 the whitening of low_rank does not contract: its 10 steps may multiply rounding errors by 1.8 each.
    cases = (Case(low_rank=2e-4), Case({"beta": 0.5, "steps": 6, "rms": 0.5}), Case({"beta": 0.4, "steps": 2}))

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        centred = grad - grad.mean(dim=1, keepdim=True)
        standardised = divide(centred, (centred**2).mean(dim=1, keepdim=True).sqrt())
        whitened = whiten(standardised, options["beta"], options["steps"])
        return options["rms"] * divide(whitened * standardised.norm(), whitened.norm())


class SinkGD(Reference):
    """Rows, then columns, scaled to entries of root mean square 1, a few times."""

    defaults: ClassVar[dict[str, Any]] = {"weight_decay": 0.0, "rms": 0.2, "sweeps": 5}
    cases = (Case(), Case({"sweeps": 1, "rms": 0.05}))

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        m, n = grad.shape
        x = grad
        for _ in range(options["sweeps"]):
            x = n**0.5 * divide(x, x.norm(dim=1, keepdim=True))
            x = m**0.5 * divide(x, x.norm(dim=0, keepdim=True))
        return options["rms"] * x


def whiten(matrix: Tensor, beta: float, steps: int) -> Tensor:
    """(X X^T)^(-1/2) X on the smaller side, from X = matrix / ||matrix||_F."""
    if matrix.shape[0] > matrix.shape[1]:
        return whiten(matrix.T, beta, steps).T
    x = divide(matrix, matrix.norm())
    identity = torch.eye(x.shape[0], dtype=torch.float64)
    y, z = x @ x.T, identity
    for _ in range(steps):
        inner = beta * (3 * identity - z @ y)
        y, z = y @ inner, inner @ z
    return z @ x
