"""Muon, whose own tests go further (test_muon_reference.py): here it shows what the harness itself can tell."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tests.optim.references.common import ORTHO, Case, Reference, momentum, orthogonalize


class Muon(Reference):
    """D = orth(N)."""

    defaults: ClassVar[dict[str, Any]] = {"weight_decay": 0.1, "momentum": 0.95, "nesterov": True, **ORTHO}
    cases = (Case(), Case({"method": "svd", "nesterov": False, "lr_scale": "spectral"}))

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        return orthogonalize(momentum(grad, state, options), options)
