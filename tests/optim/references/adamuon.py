"""AdaMuon (arXiv 2507.11005)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from tests.optim.references.common import ORTHO, Case, Reference, divide, momentum, orthogonalize, zeros


class AdaMuon(Reference):
    """O = orth(sign(N)); V <- beta2 V + (1 - beta2) O o O; D = sqrt(min(m, n)) Ohat / ||Ohat||_F."""

    defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.1,
        "momentum": 0.95,
        "beta2": 0.95,
        "nesterov": True,
        "sign": True,
        "eps": 1e-8,
        **ORTHO,
    }
    cases = (
        Case(),
        Case({"sign": False, "nesterov": False, "beta2": 0.9}),
        Case({"method": "svd", "momentum": 0.9, "eps": 0.01, "lr_scale": "original"}),
        Case({"sign": False, "method": "polar_express", "steps": 4, "lr_scale": "none"}),
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        m, n = grad.shape
        looked = momentum(grad, state, options)
        o = orthogonalize(looked.sign() if options["sign"] else looked, options)
        v = options["beta2"] * zeros(state, "second_moment", m, n) + (1 - options["beta2"]) * o * o
        state["second_moment"] = v
        normalized = o / (v.sqrt() + options["eps"])
        return divide(math.sqrt(min(m, n)) * normalized, normalized.norm())
