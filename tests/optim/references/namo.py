"""NAMO and NAMO-D (arXiv 2602.17080)."""

from __future__ import annotations

from typing import Any, ClassVar

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

_DEFAULTS = {"weight_decay": 0.1, "momentum": 0.95, "beta2": 0.99, "nesterov": False, "eps": 1e-8, **ORTHO}


class NAMO(Reference):
    """v <- beta2 v + (1 - beta2) ||G||_F^2; al = sqrt(1 - beta2^t) / (1 - mu^t) ||M||_F / (sqrt(v) + eps);
    W <- (1 - wd min(lr al, 1)) W - min(lr al s, 1) orthogonalize(M).
    """

    defaults: ClassVar[dict[str, Any]] = _DEFAULTS
    cases = (
        Case(),
        Case({"nesterov": True, "momentum": 0.9, "beta2": 0.95, "lr_scale": "original"}),
        Case({"method": "svd", "eps": 0.5, "lr_scale": "spectral"}),
        Case(
            {"weight_decay": 0.5, "method": "polar_express", "steps": 8},
            low_rank=2e-4,  # 8 iterations enlarge rounding errors more than 5
            lrs=(0.3, 0.5, 2.0, 0.4, 0.0, 1.5, 0.2, 0.3, 0.1, 0.9),  # so large that the caps act
        ),
    )

    def step_matrix(
        self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, options: dict[str, Any]
    ) -> Tensor:
        looked = momentum(grad, state, options)
        state["second_moment"] = self._mean_square(grad, state, options["beta2"])
        state["adaptation"] = self._adaptation(looked, state["second_moment"], count(state), options)
        scale = shape_scale(options, weight)
        step = (lr * state["adaptation"] * scale).clamp(max=1.0) * orthogonalize(looked, options)
        return decay(weight, options["weight_decay"] * (lr * state["adaptation"]).clamp(max=1.0), step, options) - step

    def _mean_square(self, grad: Tensor, state: dict[str, Tensor], beta2: float) -> Tensor:
        return beta2 * zeros(state, "second_moment") + (1 - beta2) * grad.square().sum()

    def _adaptation(self, looked: Tensor, v: Tensor, t: int, options: dict[str, Any]) -> Tensor:
        return _correction(t, options) * looked.norm() / (v.sqrt() + options["eps"])


class NAMOD(NAMO):
    """The same for each column j, with al_j between c and 1 / c of their mean."""

    defaults: ClassVar[dict[str, Any]] = {**_DEFAULTS, "clamp": 0.75}
    cases = (*NAMO.cases, Case({"clamp": 0.1}), Case({"clamp": 1.0, "nesterov": True}))

    def _mean_square(self, grad: Tensor, state: dict[str, Tensor], beta2: float) -> Tensor:
        return beta2 * zeros(state, "second_moment", grad.shape[1]) + (1 - beta2) * grad.square().sum(dim=0)

    def _adaptation(self, looked: Tensor, v: Tensor, t: int, options: dict[str, Any]) -> Tensor:
        ratio = looked.norm(dim=0) / (v.sqrt() + options["eps"])
        lowest, highest = options["clamp"] * ratio.mean(), ratio.mean() / options["clamp"]
        return _correction(t, options) * ratio.clamp(min=lowest, max=highest)


def _correction(t: int, options: dict[str, Any]) -> float:
    return (1 - options["beta2"] ** t) ** 0.5 / (1 - options["momentum"] ** t)
