"""REG, reconstructed (arXiv 2510.03691): rows and columns of the momentum scaled by their norms."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim.references.common import Case, Reference, divide, momentum, rms


class REG(Reference):
    """X = diag(r)^-a N diag(c)^-a with p-norms r of rows and c of columns; D = rms X / RMS(X)."""

    defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": True,
        "p": 2.0,
        "exponent": 1.0,
        "order": "sequential",
        "sweeps": 1,
        "rms": 0.2,
    }
    cases = (
        Case(),
        Case({"order": "simultaneous", "exponent": 0.5, "nesterov": False}),
        Case({"p": 1.0, "sweeps": 3, "momentum": 0.8, "rms": 0.05}),
        Case({"p": float("inf"), "exponent": 0.7, "order": "simultaneous", "sweeps": 2}),
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        x = balance(momentum(grad, state, options), **{key: options[key] for key in _OWN})
        return divide(options["rms"] * x, rms(x))


_OWN = ("p", "exponent", "order", "sweeps")


def balance(x: Tensor, p: float, exponent: float, order: str, sweeps: int) -> Tensor:
    for _ in range(sweeps):
        rows = norms(x, p)
        if order == "simultaneous":
            columns = norms(x.T, p)
            x = divide(x, rows[:, None] ** exponent)
        else:
            x = divide(x, rows[:, None] ** exponent)
            columns = norms(x.T, p)
        x = divide(x, columns[None, :] ** exponent)
    return x


def norms(x: Tensor, p: float) -> Tensor:
    """The p-norm of each row."""
    if p == float("inf"):
        return torch.stack([row.abs().max() for row in x])
    return torch.stack([(row.abs() ** p).sum() ** (1 / p) for row in x])
