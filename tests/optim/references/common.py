"""What the float64 references of the rules share. None of them shares code with the package.

To add a rule: write references/<rule>.py with a subclass of ``Reference`` that has the name of the package's class, its
``defaults`` (every argument of its own) and ``cases`` (option sets that the trajectory test runs). A rule that is
"decay, then subtract scale times direction" implements ``direction``, any other overrides ``step_matrix``. Both see one
float64 matrix; layouts, missing gradients and steps are the harness's (tests/optim/rule_cases.py). Nothing else is to
be registered: references/__init__.py finds the class.

``state`` starts as an empty dict: fill it at the first step under the package's names, one matrix each ((m, n), (n,),
0-d ...), as they are compared too. Names that begin with an underscore are the reference's own.
``options`` holds ``defaults`` updated by the case, ``cautious``, and ``loss``, what the closure returned at this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim import reference

ORTHO: dict[str, Any] = {"method": "jordan", "steps": None, "lr_scale": "match_rms_adamw"}
LRS = (0.02, 0.05, 0.01, 0.03, 0.0, 0.04, 0.02, 0.03, 0.01, 0.02)


@dataclass(frozen=True)
class Case:
    """One option set of a rule, and how near to the reference the package must stay.

    Args:
        options: keyword arguments of the package's class, but the learning rate and dtypes.
        float32: largest error of a float32 run, relative to the distance that the parameter moved in the 10 steps.
        float64: the same of a float64 run, where only the order of summation differs.
        low_rank: largest error in float32 of the parameter of this name. Five Newton-Schulz steps enlarge rounding
            errors in its null space some 500 times, from 6e-8; say at the case why one needs more than that.
        seed: of weights and gradients; chosen where a rule is discontinuous.
        without: names of parameters (rule_cases.SHAPES) that the rule cannot be compared on; say why at the case.
        lrs: learning rate of each step.
    """

    options: dict[str, Any] = field(default_factory=dict)
    float32: float = 1e-5
    float64: float = 1e-10
    low_rank: float = 3e-5
    seed: int = 0
    without: tuple[str, ...] = ()
    lrs: tuple[float, ...] = LRS


class Reference:
    """Base of the references."""

    defaults: ClassVar[dict[str, Any]] = {}
    cases: ClassVar[tuple[Case, ...]] = (Case(),)
    # States that are not unique (signs of singular vectors, ...): only their shapes are compared.
    uncompared: ClassVar[tuple[str, ...]] = ()

    def step_matrix(
        self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, options: dict[str, Any]
    ) -> Tensor:
        """The new weights. W <- (1 - lr wd) W - lr s(m, n) D, with plain or cautious decay."""
        update = shape_scale(options, weight) * self.direction(grad, state, options)
        return decay(weight, lr * options["weight_decay"], update, options) - lr * update

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        """D (m, n)."""
        raise NotImplementedError


def zeros(state: dict[str, Tensor], key: str, *shape: int) -> Tensor:
    """``state[key]``, zero before the first step."""
    return state.setdefault(key, torch.zeros(shape, dtype=torch.float64))


def count(state: dict[str, Tensor]) -> int:
    """t = 1, 2, ... of this step, kept as ``state["step"]``."""
    state["step"] = zeros(state, "step") + 1
    return int(state["step"])


def momentum(grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """M <- mu M + (1 - mu) G, kept as ``state["momentum_buffer"]``; returned: M, or mu M + (1 - mu) G with nesterov."""
    mu = options["momentum"]
    buffer = mu * zeros(state, "momentum_buffer", *grad.shape) + (1 - mu) * grad
    state["momentum_buffer"] = buffer
    return mu * buffer + (1 - mu) * grad if options.get("nesterov", False) else buffer


def orthogonalize(matrix: Tensor, options: dict[str, Any]) -> Tensor:
    """Newton-Schulz or SVD as the options say; the exact polar factor for methods that converge to it."""
    if options["method"] == "qdwh":
        return reference.polar(matrix)
    # "gram" is the same polynomials, multiplied in another order.
    method = "polar_express" if options["method"] == "gram" else options["method"]
    return reference.orthogonalize(matrix, method, options["steps"])


def shape_scale(options: dict[str, Any], weight: Tensor) -> float:
    return reference.shape_scale(options.get("lr_scale", "none"), *weight.shape)


def decay(weight: Tensor, amount: float | Tensor, update: Tensor, options: dict[str, Any]) -> Tensor:
    """W - amount W; if cautious, only entries that what is subtracted also moves towards zero, or leaves alone."""
    if options["cautious"]:
        return weight - amount * torch.where(weight * update >= 0, weight, torch.zeros_like(weight))
    return weight - amount * weight


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0."""
    safe = torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return torch.where(denominator == 0, torch.zeros_like(numerator * safe), numerator / safe)


def rms(matrix: Tensor) -> Tensor:
    return (matrix**2).mean().sqrt()
