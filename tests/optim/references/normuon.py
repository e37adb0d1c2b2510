"""NorMuon (arXiv 2510.05491)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim.references.common import ORTHO, Case, Reference, divide, momentum, orthogonalize, zeros


class NorMuon(Reference):
    """v <- beta2 v + (1 - beta2) mean of O^2 along each row (or column); D = c O / (sqrt(v) + eps)."""

    defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.1,
        "momentum": 0.95,
        "beta2": 0.95,
        "nesterov": True,
        "norm": "rms",
        "axis": "row",
        "eps": 1e-8,
        **ORTHO,
    }
    cases = (
        Case(),
        Case({"norm": "preserve", "axis": "long", "nesterov": False, "beta2": 0.8, "lr_scale": "original"}),
        Case({"axis": "long", "method": "svd", "momentum": 0.9, "eps": 0.01, "lr_scale": "spectral"}),
        Case({"norm": "preserve", "method": "polar_express", "steps": 4, "beta2": 0.0, "lr_scale": "none"}),
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        m, n = grad.shape
        o = orthogonalize(momentum(grad, state, options), options)
        by_row = options["axis"] == "row" or m >= n
        size = m if by_row else n
        mean_square = torch.stack([((o[i] if by_row else o[:, i]) ** 2).mean() for i in range(size)])
        v = options["beta2"] * zeros(state, "second_moment", size) + (1 - options["beta2"]) * mean_square
        state["second_moment"] = v
        normalizer = v.sqrt() + options["eps"]
        normalized = o / (normalizer.reshape(m, 1) if by_row else normalizer.reshape(1, n))
        target = o.norm() if options["norm"] == "preserve" else torch.tensor(float(min(m, n))).double().sqrt()
        return divide(target * normalized, normalized.norm())
