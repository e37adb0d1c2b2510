"""SpecMuon (arXiv 2602.16167, as transcribed by a third party)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.optim.references.common import Case, Reference, count, zeros


class SpecMuon(Reference):
    """G / (||G||_F + eps) = U S V^T; the k largest modes have an energy r_j each, sqrt(L) before the first step.

        r'_j  = r_j / (1 + lr ||d_j|| / (2 (s_j + eps))),   ||d_j|| = s_j / (sqrt(L) + eps)
        T_j   = (1 - xi) r'_j^2 + xi r_j^2 + (1 - xi) (r'_j - r_j)^2
        chi_j = clip((sqrt(L) - sqrt(T_j)) / (sqrt(L) - r'_j + eps), 0, 1)
        r_j  <- chi_j r'_j + (1 - chi_j) sqrt(L)
        O     = sum_{j <= k} r'_j / (sqrt(L) + eps) u_j v_j^T + sum_{j > k} s_j u_j v_j^T
        B    <- mu B + O,   D = B

    A mode whose singular value is rounding error has no direction and is left out of O.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.0,
        "momentum": 0.95,
        "modes": 8,
        "relaxation": 0.5,
        "eps": 1e-8,
    }
    cases = (
        Case(),
        Case({"modes": 2, "relaxation": 0.1, "momentum": 0.8}),
        Case({"modes": 3, "relaxation": 0.9, "eps": 1e-3}, lrs=(0.3, 0.5, 1.0, 0.4, 0.0, 0.6, 0.2, 0.3, 0.1, 0.9)),
    )

    def direction(self, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        eps, xi, root = options["eps"], options["relaxation"], options["loss"] ** 0.5
        u, s, vh = torch.linalg.svd(grad / (grad.norm() + eps), full_matrices=False)
        k = min(options["modes"], *grad.shape)
        r = torch.full((k,), root, dtype=torch.float64) if count(state) == 1 else state["energies"]
        relaxed = r / (1 + 0.5 * options["lr"] / (s[:k] + eps) * s[:k] / (root + eps))
        target = (1 - xi) * relaxed**2 + xi * r**2 + (1 - xi) * (relaxed - r) ** 2
        chi = ((root - target.sqrt()) / (root - relaxed + eps)).clamp(0, 1)
        state["energies"] = chi * relaxed + (1 - chi) * root
        coefficients = torch.cat([relaxed / (root + eps), s[k:]]) * (s > 1e-12)
        buffer = options["momentum"] * zeros(state, "momentum_buffer", *grad.shape) + (u * coefficients) @ vh
        state["momentum_buffer"] = buffer
        return buffer
