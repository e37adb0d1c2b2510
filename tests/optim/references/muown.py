"""Muown (arXiv 2605.10797): Muon on the directions of the rows, Adam on their magnitudes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim.references.common import (
    ORTHO,
    Case,
    Reference,
    count,
    decay,
    momentum,
    orthogonalize,
    shape_scale,
    zeros,
)

FLOOR = 1e-12


class Muown(Reference):
    """Row by row, with u = W / g and v = u ||v||, where g = ||v|| = ||W|| (1e-12 at least) before the first step:

    dg = <G, u>,   dv = g / ||v|| (G - u dg)
    M <- mu M + (1 - mu) dv,   v <- v - lr s orthogonalize(mu M + (1 - mu) dv)
    g <- g - lr Adam(dg),      W <- g v / ||v|| - lr wd W
    g <- ||W||, with the sign it had
    """

    defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.0,
        "momentum": 0.95,
        "nesterov": True,
        "magnitude_betas": (0.9, 0.95),
        "eps": 1e-8,
        **ORTHO,
    }
    cases = (
        Case(),
        Case({"weight_decay": 0.0}),
        Case({"nesterov": False, "momentum": 0.8, "magnitude_betas": (0.5, 0.9), "eps": 0.01, "lr_scale": "original"}),
        Case({"method": "svd", "weight_decay": 1.0, "lr_scale": "spectral"}),
    )

    def step_matrix(
        self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, options: dict[str, Any]
    ) -> Tensor:
        t = count(state)
        if t == 1:
            state["magnitude"] = state["direction_norm"] = weight.norm(dim=1).clamp(min=FLOOR)
        g, norm = state["magnitude"], state["direction_norm"]
        unit = weight / g[:, None]
        grad_g = (grad * unit).sum(dim=1)
        grad_v = (g / norm)[:, None] * (grad - unit * grad_g[:, None])
        step = shape_scale(options, weight) * orthogonalize(momentum(grad_v, state, options), options)
        v = unit * norm[:, None] - lr * step
        state["direction_norm"] = v.norm(dim=1).clamp(min=FLOOR)
        g = g - lr * self._adam(grad_g, state, t, options)
        undecayed = (g / state["direction_norm"])[:, None] * v
        new = undecayed - (weight - decay(weight, lr * options["weight_decay"], weight - undecayed, options))
        # A row of length 0 keeps its magnitude of 1e-12; where nothing decays the length is g's to begin with.
        decayed = new.norm(dim=1).clamp(min=FLOOR) * torch.where(g < 0, -1.0, 1.0)
        state["magnitude"] = decayed if options["weight_decay"] else g
        return new

    def _adam(self, grad: Tensor, state: dict[str, Tensor], t: int, options: dict[str, Any]) -> Tensor:
        beta1, beta2 = options["magnitude_betas"]
        first = beta1 * zeros(state, "magnitude_exp_avg", *grad.shape) + (1 - beta1) * grad
        second = beta2 * zeros(state, "magnitude_exp_avg_sq", *grad.shape) + (1 - beta2) * grad**2
        state["magnitude_exp_avg"], state["magnitude_exp_avg_sq"] = first, second
        return first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + options["eps"])
