"""MuonHyperball: Muon's step on the sphere of matrices of fixed norm."""

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
    r"""Muon with weights and steps of fixed Frobenius norm: the learning rate is the relative change per step.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        U_t &= \operatorname{orthogonalize}(\tilde M_t) \\
        W_t &= R\, N\big((1 - \eta\lambda)\, W_{t-1} - \eta R\, N(U_t)\big), \qquad N(X) = X / \|X\|_F

    :math:`R` is the norm of the matrix before its first step, or ``radius``. Each block of a fused weight and each
    expert has its own radius. A matrix whose step is zero, because its gradient or the learning rate is 0, does not
    change.

    Source: Wen et al., arXiv 2606.16899, and an author's code (MuonH in track 3 of
    github.com/KellerJordan/modded-nanogpt). In that code :math:`R` is the norm before each step instead of the first,
    so that rounding errors add up, and there is no weight decay. NVIDIA's Emerging-Optimizers has one radius for all
    matrices, as with ``radius`` here.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`, the norm of a step relative to that of the weights: 0.01 is 1 %. It needs no
            shape scale. Learning rates of AdamW do not carry over.
        weight_decay: decoupled weight decay :math:`\lambda`. As the norm is fixed, it only lengthens the step, by
            :math:`1 / (1 - \eta\lambda)`; with ``cautious`` it also changes the direction of the weights.
        momentum: :math:`\mu`, from 0 to below 1.
        nesterov: use Nesterov momentum, which looks one step ahead.
        radius: norm :math:`R` of every matrix of the group; None for the initial norm of each matrix.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the momentum; None for the dtype of each parameter. Radii are float32 at least.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight, and ``radius``, one element per matrix. A checkpoint contains
    the radius. If only the weights are loaded after the first step, the next step scales them to the old radius.

    Cost: that of Muon, and three passes over weights and step for norms and scaling.

    Prefer it if the scale of the weights does not matter, because a normalization follows, or if it is right from the
    start: there is no weight decay to tune, and the paper uses one learning rate for all widths and depths. Do not use
    it if weights must grow or shrink: output layers without a gain, LoRA factors and other matrices that start at zero.

    Raises:
        ValueError: if an argument is out of range, if a parameter cannot be read as matrices, or if a matrix is zero
            and there is no ``radius``.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> optimizer = MuonHyperball([model[0].weight], lr=1e-2)
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
        # Computed at the first step, because the weights here are rounded to the dtype of the state.
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
        moves = (norm != 0) & (lr != 0)  # true for NaN, which must propagate
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
    """Frobenius norms: (B, m, n) -> (B,)."""
    norms: Tensor = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    return norms
