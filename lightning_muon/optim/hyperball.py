"""MuonHyperball: Muon's step on the sphere of matrices of one norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.optim.arguments import check_positive, parameter_names
from lightning_muon.optim.matrix import NonFinite
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer
from lightning_muon.optim.weight_aware import WeightAwareOptimizer, WeightReader
from lightning_muon.partition import MatrixLayout


class MuonHyperball(WeightAwareOptimizer, OrthogonalizingOptimizer):
    r"""Muon with weights and steps of fixed Frobenius norm, so that the learning rate is the relative change a step.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        U_t &= \operatorname{orthogonalize}(\tilde M_t) \\
        W_t &= R\, N\big((1 - \eta\lambda)\, W_{t-1} - \eta R\, N(U_t)\big), \qquad N(X) = X / \|X\|_F

    :math:`R` is the norm that the matrix had before its first step, or ``radius``. Blocks of fused weights and experts
    have a radius each. A matrix whose step is zero, for want of a gradient or with a learning rate of 0, stays as it
    is.

    Source: Wen et al., arXiv 2606.16899, and an author's code (MuonH in track 3 of
    github.com/KellerJordan/modded-nanogpt), which takes for :math:`R` the norm before each step instead of the first,
    and so lets rounding add up, and has no weight decay. NVIDIA's Emerging-Optimizers wants one radius for all
    matrices, which is ``radius``.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`, the length of a step in parts of the weights' norm: 0.01 is 1 %. It needs no
            shape scale, and is not comparable with AdamW's.
        weight_decay: decoupled weight decay :math:`\lambda`. As the norm is fixed, it only lengthens the step, by
            :math:`1 / (1 - \eta\lambda)`; with ``cautious`` it turns the weights too.
        momentum: :math:`\mu`, from 0 to below 1.
        nesterov: look one step ahead.
        radius: norm :math:`R` of every matrix of the group; None for the one that each starts with.
        method: how to orthogonalize; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the method's own.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None to choose by device.
        state_dtype: dtype of the momentum; None for each parameter's own. Radii are float32 at least.
        nonfinite: what NaN or infinity in a gradient does; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight, and ``radius``, one a matrix. A checkpoint brings the radius
    back; weights loaded without it, into an optimizer that has made steps, are brought to the old radius by the next.

    Cost: Muon's, and three passes over weights and step for norms and scaling.

    Prefer it where the scale of the weights does not matter, because a normalization follows, or is right from the
    start: there is no weight decay to tune, and the paper keeps one learning rate over widths and depths. Do not use it
    where weights must grow or shrink: output layers without a gain, LoRA factors and other matrices that start at zero.

    Raises:
        ValueError: for an argument out of range, for a parameter that cannot be read as matrices, and for a matrix of
            zeros without ``radius``.

    Example::

        optimizer = MuonHyperball(block.linear.parameters(), lr=1e-2)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        radius: float | None = None,
        method: OrthogonalizationMethod = "jordan",
        steps: int | None = None,
        cautious: bool = False,
        orthogonalize_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "radius": radius,
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, defaults, lr_scale="none", cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["radius"] is not None:
            check_positive(group, "radius")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter, name in zip(group["params"], parameter_names(group), strict=True):
            if group["radius"] is None and _has_zero_matrix(parameter, self.layouts[parameter]):
                self.param_groups.pop()
                raise ValueError(
                    f"Parameter {name!r} is zero, or a matrix in it is, so that it has no norm to keep: give its group "
                    "a 'radius', initialize it, or send it to another optimizer."
                )

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        # Measured at the first step: the weights here are rounded to the dtype of the state.
        radius = stack.new_zeros(stack.shape[0], dtype=torch.promote_types(stack.dtype, torch.float32))
        return {**super().init_state(stack, group), "radius": radius}

    def next_weights(
        self, read_weights: WeightReader, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        lr: float | Tensor = group["lr"]
        step = self.orthogonalize(self.momentum(grad, state, group), group)
        weights = read_weights()
        radius = state["radius"]
        if group["radius"] is not None:
            radius.fill_(group["radius"])
        else:
            radius.copy_(torch.where(radius == 0, _norms(weights), radius))
        step = step.to(weights.dtype)
        norm = _norms(step)
        moves = (norm != 0) & (lr != 0)  # true for NaN, which goes on
        step *= (lr * radius / torch.where(norm == 0, 1.0, norm))[:, None, None]
        if group["weight_decay"] != 0:
            amount = lr * group["weight_decay"] * moves.to(weights.dtype)
            weights = self.decay_(weights, step, amount[:, None, None], group)
        weights -= step
        norm = _norms(weights)
        retraction = torch.where(moves & (norm != 0), radius / norm, 1.0)[:, None, None]
        step *= retraction
        return weights.mul_(retraction).add_(step), step


def _has_zero_matrix(parameter: Tensor, layout: MatrixLayout) -> bool:
    if parameter.is_meta or parameter.numel() == 0:
        return False
    matrices = (view.tensor.reshape(view.shape) for view in layout.views(parameter.detach()))
    return any(bool((stack == 0).flatten(1).all(dim=1).any()) for stack in matrices)


def _norms(stack: Tensor) -> Tensor:
    """(B, m, n) -> (B,) Frobenius norms."""
    norms: Tensor = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    return norms
