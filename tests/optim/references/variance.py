"""Muon-NSR and Muon-VS (arXiv 2601.14603)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tests.optim.references.common import ORTHO, Case, Reference, count, orthogonalize, zeros

_DEFAULTS = {"weight_decay": 0.1, "momentum": 0.95, "eps": 1e-8, **ORTHO}


class MuonNSR(Reference):
    """Momentum divided entrywise by sqrt(Ntilde^2 + gamma Gammahat) + eps, then orthogonalized."""

    defaults: ClassVar[dict[str, Any]] = {**_DEFAULTS, "gamma": 10.0}
    cases = (
        Case(),
        Case({"gamma": 0.3, "momentum": 0.8, "lr_scale": "original"}),
        Case({"gamma": 1000.0, "eps": 0.1}),
        # The first direction is near the signs of the gradient, which for "low_rank" are nearly singular: an exact
        # polar factor is as sensitive as that. A smaller eps or larger gamma brings it nearer still.
        Case({"eps": 0.1, "method": "svd"}, low_rank=6e-5),
        Case({"gamma": 0.0, "method": "polar_express"}),
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        beta = options["momentum"]
        old = zeros(state, "momentum_buffer", *grad.shape)
        variance = beta * zeros(state, "variance", *grad.shape) + beta * (1 - beta) * (old - grad) ** 2
        new = beta * old + (1 - beta) * grad
        state["variance"], state["momentum_buffer"] = variance, new
        correction = 1 - beta ** count(state)
        looked = grad + beta / (1 - beta) * (new / correction)
        return orthogonalize(looked / (self.root(looked, variance / correction, options) + options["eps"]), options)

    def root(self, looked: Tensor, variance: Tensor, options: dict[str, Any]) -> Tensor:
        return (looked**2 + options["gamma"] * variance).sqrt()


class MuonVS(MuonNSR):
    """Divided by sqrt(Gammahat) + eps instead."""

    defaults = _DEFAULTS
    cases = (
        Case(),
        Case({"momentum": 0.8, "lr_scale": "original"}),
        Case({"eps": 0.1, "method": "svd"}),
    )

    def root(self, looked: Tensor, variance: Tensor, options: dict[str, Any]) -> Tensor:
        return variance.sqrt()
