"""Conda (arXiv 2509.24218)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim.references.common import Case, Reference, count, zeros


class Conda(Reference):
    """m <- b1 m + (1 - b1) G; Q = V (U if m < n) of m = U S V^T at the first step whose m is not zero, then every T;
    v <- b2 v + (1 - b2) (G Q)^2; D = scale sqrt(1 - b2^t) / (1 - b1^t) [m Q / (sqrt(v) + eps)] Q^T.

    Left-handed (Q^T G and so on) where there are fewer rows than columns. v is not rotated when Q changes.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "scale": 0.25,
        "update_every": 2000,
    }
    uncompared = ("basis",)  # signs
    # The first moment of low_rank has a null space, whose basis is anybody's choice, and later gradients leave it.
    cases = (
        Case(without=("low_rank",)),
        Case({"update_every": 3, "betas": (0.8, 0.9), "scale": 1.0}, without=("low_rank",)),
        Case({"update_every": 1, "eps": 0.1}, without=("low_rank",)),
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        beta1, beta2 = options["betas"]
        left = grad.shape[0] < grad.shape[1]
        state["exp_avg"] = beta1 * zeros(state, "exp_avg", *grad.shape) + (1 - beta1) * grad
        t = count(state)
        age = int(zeros(state, "age"))
        if age == 0 and state["exp_avg"].any():
            u, _, vh = torch.linalg.svd(state["exp_avg"], full_matrices=False)
            state["basis"] = u if left else vh.T
        if age > 0 or state["exp_avg"].any():
            state["age"] = torch.tensor(float((age + 1) % options["update_every"]))
        q = state.setdefault("basis", torch.eye(min(grad.shape), dtype=torch.float64))
        rotated = q.T @ grad if left else grad @ q
        state["exp_avg_sq"] = beta2 * zeros(state, "exp_avg_sq", *grad.shape) + (1 - beta2) * rotated**2
        first = q.T @ state["exp_avg"] if left else state["exp_avg"] @ q
        normalized = first / (state["exp_avg_sq"].sqrt() + options["eps"])
        correction = (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        return options["scale"] * correction * (q @ normalized if left else normalized @ q.T)
