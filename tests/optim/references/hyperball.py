"""MuonHyperball (arXiv 2606.16899)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim.references.common import Case, Reference, decay, divide, momentum, orthogonalize


class MuonHyperball(Reference):
    """W <- R N((1 - lr wd) W - lr R N(U)) with N(X) = X / ||X||_F, U = orthogonalize(momentum), R the first ||W||_F."""

    defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.0,
        "momentum": 0.95,
        "nesterov": True,
        "radius": None,
        "method": "jordan",
        "steps": None,
    }
    cases = (
        Case(),
        Case({"radius": 3.0, "nesterov": False, "weight_decay": 2.0}),
        Case({"method": "svd", "momentum": 0.5}),
    )

    def step_matrix(
        self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, options: dict[str, Any]
    ) -> Tensor:
        if "radius" not in state:
            given = options["radius"]
            state["radius"] = weight.norm() if given is None else torch.tensor(float(given), dtype=torch.float64)
        direction = orthogonalize(momentum(grad, state, options), options)
        step = lr * state["radius"] * divide(direction, direction.norm())
        moved = decay(weight, lr * options["weight_decay"], step, options) - step
        return state["radius"] * divide(moved, moved.norm())
