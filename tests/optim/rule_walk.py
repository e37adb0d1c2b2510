"""One matrix, its weights after each step, and what the optimizer saw and kept."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_muon.optim.matrix import MatrixOptimizer
from tests.optim.observed import by_name


@dataclass
class Walk:
    """A run on one matrix.

    Args:
        weights: before the first step and after each.
        updates: what the observers got.
        states: copies after each step.
        optimizer: that made it.
        param: that it moved.
    """

    optimizer: MatrixOptimizer
    param: nn.Parameter
    weights: list[Tensor]
    updates: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)

    def step(self, grad: Tensor | None, loss: float | Tensor | None = None) -> None:
        self.param.grad = None if grad is None else grad.to(self.param.dtype)
        self.optimizer.step(None if loss is None else lambda: loss)
        self.weights.append(self.param.detach().clone())
        self.states.append({key: value.clone() for key, value in self.optimizer.state[self.param].items()})

    @property
    def moves(self) -> list[Tensor]:
        """Old weights minus new."""
        return [old - new for old, new in zip(self.weights, self.weights[1:], strict=False)]


def walk(
    rule: type[MatrixOptimizer],
    weight: Tensor,
    grads: Sequence[Tensor] = (),
    losses: Sequence[float | None] = (),
    **options: object,
) -> Walk:
    """A run in the dtype of the weight, products included."""
    if "orthogonalize_dtype" in inspect.signature(rule).parameters:
        options = {"orthogonalize_dtype": weight.dtype, **options}
    param = nn.Parameter(weight.clone())
    run = Walk(rule([param], **options), param, [weight.clone()])
    run.optimizer.observe_updates(by_name(lambda name, update: run.updates.append(update)))
    for index, grad in enumerate(grads):
        run.step(grad, losses[index] if losses else None)
    return run


def relative(found: Tensor, wanted: Tensor) -> float:
    """Distance in parts of the wanted norm."""
    return float(torch.linalg.vector_norm(found.double() - wanted.double()) / torch.linalg.vector_norm(wanted.double()))
