"""Dion2 (microsoft/dion)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim.references.common import ORTHO, Case, Reference, orthogonalize, zeros


class Dion2(Reference):
    """M <- M + G; K: the ceil(fraction min(m, n)) slices of largest l1 norm, rows if m <= n, else columns;
    D = orthogonalize(M_K) in the slices K, zero elsewhere; M_K <- mu M_K.
    """

    defaults: ClassVar[dict[str, Any]] = {"weight_decay": 0.1, "momentum": 0.95, "fraction": 0.25, **ORTHO}
    cases = (
        Case(),
        Case({"fraction": 1.0, "lr_scale": "original"}),
        Case({"fraction": 0.6, "momentum": 0.5, "method": "svd", "lr_scale": "spectral"}),
        Case({"fraction": 0.01, "momentum": 0.0, "lr_scale": "none"}),
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        buffer = zeros(state, "momentum_buffer", *grad.shape) + grad
        rows = grad.shape[0] <= grad.shape[1]
        slices = range(min(grad.shape))
        sums = [float((buffer[i] if rows else buffer[:, i]).abs().sum()) for i in slices]
        size = max(1, math.ceil(options["fraction"] * len(sums)))
        chosen = sorted(slices, key=lambda i: -sums[i])[:size]
        selected = torch.stack([buffer[i] if rows else buffer[:, i] for i in chosen], dim=0 if rows else 1)
        orthogonal = orthogonalize(selected, options)
        direction = torch.zeros_like(buffer)
        for place, i in enumerate(chosen):
            if rows:
                direction[i], buffer[i] = orthogonal[place], options["momentum"] * buffer[i]
            else:
                direction[:, i], buffer[:, i] = orthogonal[:, place], options["momentum"] * buffer[:, i]
        state["momentum_buffer"] = buffer
        return direction
