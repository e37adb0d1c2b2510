"""Conda: Adam in the singular basis of its momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg.scale import largest_magnitude
from lightning_muon.optim.arguments import (
    bias_correction,
    check_betas,
    check_integer,
    check_positive,
    dtype_for_squares,
)
from lightning_muon.optim.matrix import MatrixOptimizer, NonFinite


class Conda(MatrixOptimizer):
    r"""Conda, column-normalized Adam: Adam's step along the singular directions of the momentum.

    Muon gives every singular direction of the momentum the same step. Conda rotates the matrix into the singular basis
    and gives each element its own step, by the second moment of the rotated gradient. For wide matrices (m < n),

    .. math::
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1)\, G_t \\
        Q_t &= U \quad\text{of}\quad M_t = U \Sigma V^\top \quad\text{every}\ T\ \text{steps, else}\quad Q_{t-1} \\
        V_t &= \beta_2 V_{t-1} + (1 - \beta_2)\, (Q_t^\top G_t)^2 \\
        D_t &= \kappa\, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\; Q_t \frac{Q_t^\top M_t}{\sqrt{V_t} + \epsilon} \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta D_t

    with elementwise square, root and quotient. Otherwise the rotation is on the right, by :math:`Q = V`:
    :math:`G Q`, :math:`M Q` and the quotient times :math:`Q^\top`. So the basis is always the small one, k x k with
    k = min(m, n). :math:`V_t` is not changed when the basis is renewed, although the axes have turned a little.

    Singular vectors are unique up to sign only. The sign does not matter: it cancels in the square, and when the step
    is rotated back. If singular values are equal, e.g. in the null space of a momentum of low rank, the basis is not
    unique: the step depends on it, and may differ between two machines. If the momentum is NaN or infinite when the
    basis is due, the old basis stays (at first the identity), and the next step tries again. A matrix whose gradients
    have all been zero, as behind a layer that starts at zero, gets its basis with the first nonzero gradient.

    Source: Wang et al., arXiv 2509.24218. As in the authors' code, the small side is rotated (the paper writes U
    throughout). Unlike in their code, weights decay before the step, as in all rules of this package; the difference is
    :math:`\eta^2 \lambda D`.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`. Steps have AdamW's size times ``scale``: start with about 1 / ``scale`` times
            the learning rate of AdamW.
        weight_decay: decoupled weight decay :math:`\lambda`.
        betas: :math:`\beta_1` and :math:`\beta_2`, from 0 to below 1.
        eps: :math:`\epsilon`, above 0.
        scale: :math:`\kappa`, the root mean square of the elements of the first step.
        update_every: :math:`T`, number of steps of a matrix between two bases, counted from its first step.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        state_dtype: dtype of both moments; None for the dtype of each parameter. With float16, where squares underflow,
            the second moment is float32. The basis is float32 at least, because a rounded basis is not orthonormal.
            With bfloat16 the basis of nearly equal singular values differs, and steps differ by about 1 to 10 %.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``exp_avg`` (not rotated) and ``exp_avg_sq`` (rotated), one element per weight each; ``basis``, min(m, n)^2
    elements per matrix; ``age``, the steps since the basis was computed (0 if the next step computes one), and
    ``step``, one element per matrix each. That is 1 to 1.5 times the memory of AdamW, two to three times that of Muon.

    Cost: three products with the basis per step, a fifth (square matrices) to a third of Muon's. Every
    ``update_every`` steps a singular value decomposition, which takes 0.3 seconds on one CPU core for 1024 x 1024, and
    eight times as long for twice the size. A step synchronizes with the device once.

    Prefer it to AdamW if gradients have few strong directions that are not along the axes, and to Muon if a step should
    also treat frequent and rare elements differently. Prefer Muon or :class:`~lightning_muon.optim.NorMuon` if memory
    is scarce, or if the matrices are so large that the decomposition takes too long.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> optimizer = Conda([model[0].weight], lr=4e-3, weight_decay=0.01)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        scale: float = 0.25,
        update_every: int = 2000,
        cautious: bool = False,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "scale": scale,
            "update_every": update_every,
        }
        super().__init__(
            params, defaults, lr_scale="none", cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_betas(group, "betas")
        check_positive(group, "eps")
        check_positive(group, "scale")
        check_integer(group, "update_every", 1)

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        wide = torch.promote_types(stack.dtype, torch.float32)
        side = min(stack.shape[1:])
        return {
            "exp_avg": torch.zeros_like(stack),
            "exp_avg_sq": torch.zeros_like(stack, dtype=dtype_for_squares(stack.dtype)),
            "basis": torch.eye(side, dtype=wide, device=stack.device).repeat(stack.shape[0], 1, 1),
            "age": stack.new_zeros(stack.shape[0], dtype=wide),
            "step": stack.new_zeros(stack.shape[0], dtype=wide),
        }

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        exp_avg, exp_avg_sq, basis = state["exp_avg"], state["exp_avg_sq"], state["basis"]
        exp_avg.lerp_(grad, 1 - beta1)
        _renew(basis, state["age"], exp_avg, group["update_every"])
        step = state["step"].add_(1)
        gradient = _rotated(grad, basis)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        quotient = _rotated(exp_avg, basis)
        quotient /= torch.sqrt(exp_avg_sq.to(quotient.dtype), out=gradient).add_(group["eps"])
        direction = _rotated(quotient, basis.mT, out=gradient)
        direction *= group["scale"] * bias_correction(step, beta2).sqrt_() / bias_correction(step, beta1)
        return direction.to(grad.dtype)


def _renew(basis: Tensor, age: Tensor, momentum: Tensor, every: int) -> None:
    """Set bases of age 0 to the singular vectors of the momentum, on its short side; increase the age of the others.

    Args:
        basis: (B, k, k), overwritten where the age is 0 and the momentum is finite and not zero.
        age: (B,) steps since the basis was computed, modulo ``every``; stays 0 if it could not be computed.
        momentum: (B, m, n).
        every: number of steps until the next basis.
    """
    due = (age == 0).nonzero().squeeze(1)
    age.add_(1).remainder_(every)
    if not len(due):
        return
    chosen = momentum[due].to(basis.dtype)
    largest = largest_magnitude(chosen.flatten(1), 1).squeeze(1)  # NaN if any element is
    usable = (largest > 0) & largest.isfinite()
    age[due[~usable]] = 0
    index = due[usable]
    if not len(index):
        return
    # The scale does not change singular vectors, but the decomposition fails if squares underflow or overflow.
    chosen = chosen[usable].div_(largest[usable][:, None, None])
    u, _, vh = torch.linalg.svd(chosen, full_matrices=False)
    basis[index] = u if _wide(momentum) else vh.mT


def _rotated(matrices: Tensor, basis: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate (B, m, n) into the basis (B, k, k), in the dtype of the basis; the transposed basis rotates back."""
    matrices = matrices.to(basis.dtype)
    return torch.matmul(*((basis.mT, matrices) if _wide(matrices) else (matrices, basis)), out=out)


def _wide(matrices: Tensor) -> bool:
    return matrices.shape[-2] < matrices.shape[-1]
