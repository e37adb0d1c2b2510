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
    r"""Conda, column-normalized Adam: Adam's step, taken along the singular directions of the momentum.

    Muon gives every singular direction of the momentum the same step; Conda gives each entry in the rotated matrix a
    step of its own, by the second moment of the rotated gradient. For wide matrices (m < n),

    .. math::
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1)\, G_t \\
        Q_t &= U \quad\text{of}\quad M_t = U \Sigma V^\top \quad\text{every}\ T\ \text{steps, else}\quad Q_{t-1} \\
        V_t &= \beta_2 V_{t-1} + (1 - \beta_2)\, (Q_t^\top G_t)^2 \\
        D_t &= \kappa\, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\; Q_t \frac{Q_t^\top M_t}{\sqrt{V_t} + \epsilon} \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta D_t

    with elementwise square, root and quotient. Otherwise the rotation is on the right, by :math:`Q = V`:
    :math:`G Q`, :math:`M Q` and the quotient times :math:`Q^\top`. So the basis is always the small one, k x k with
    k = min(m, n). :math:`V_t` stays as it is when the basis is renewed, in axes that have turned a little.

    Singular vectors are known up to sign only, which changes nothing: a sign cancels in the square, and in the way
    there and back. Where singular values coincide, above all in the null space of a momentum of low rank, the basis is
    any orthonormal one, the step depends on which, and two machines may differ. A momentum that is NaN or infinite
    when its turn comes keeps its basis, at first the identity, and the next step tries again; a matrix whose gradients
    were all zero so far, as behind a layer that starts at zero, gets its basis with the first that is not.

    Source: Wang et al., arXiv 2509.24218. As in the authors' code the small side is rotated (the paper writes U
    throughout); unlike it, weights decay before the step and not after, as everywhere here, which differs by
    :math:`\eta^2 \lambda D`.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`. Steps have AdamW's size times ``scale``, so that some 1 / ``scale`` times
            AdamW's learning rate is the place to start.
        weight_decay: decoupled weight decay :math:`\lambda`.
        betas: :math:`\beta_1` and :math:`\beta_2`, from 0 to below 1.
        eps: :math:`\epsilon`, above 0.
        scale: :math:`\kappa`, the root mean square of the entries of the first step.
        update_every: :math:`T`, after how many of its own steps a matrix gets a new basis, counted from its first.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        state_dtype: dtype of both moments; None for each parameter's own. The second is float32 where that is float16,
            in which squares vanish. The basis is float32 at least: a rounded one is not orthonormal. With bfloat16 the
            basis of nearly equal singular values comes out another, and steps differ by some 1 to 10 %.
        nonfinite: what NaN or infinity in a gradient does; see :class:`MatrixOptimizer`.

    State: ``exp_avg`` (not rotated) and ``exp_avg_sq`` (rotated), one element per weight each, ``basis``,
    min(m, n)^2 elements a matrix; ``age``, steps since the basis was taken, 0 where the next step is to take one, and
    ``step``, a number a matrix each: AdamW's memory and up to half as much again, two to three times Muon's.

    Cost: three products with the basis a step, a fifth (square matrices) to a third of Muon's; every ``update_every``
    steps a singular value decomposition, which takes one CPU core 0.3 seconds for 1024 x 1024 and eight times that for
    twice the size. A step waits for the device once.

    Prefer it to AdamW where gradients have few strong directions that AdamW's axes do not follow, and to Muon where a
    step should also tell frequent from rare entries. Prefer Muon or :class:`~lightning_muon.optim.NorMuon` where memory
    counts, or matrices are so large that the decomposition hurts.

    Raises:
        ValueError: for an argument out of range, and for a parameter that cannot be read as matrices.

    Example::

        optimizer = Conda(block.linear.parameters(), lr=4e-3, weight_decay=0.01)
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
    """Set bases of age 0 to the singular vectors of the momentum, on its short side; all others grow older.

    Args:
        basis: (B, k, k), overwritten where the age is 0 and the momentum neither zero nor NaN or infinite.
        age: (B,) steps since the basis was taken, modulo ``every``; stays 0 where it could not be taken.
        momentum: (B, m, n).
        every: after how many steps the next is due.
    """
    due = (age == 0).nonzero().squeeze(1)
    age.add_(1).remainder_(every)
    if not len(due):
        return
    chosen = momentum[due].to(basis.dtype)
    largest = largest_magnitude(chosen.flatten(1), 1).squeeze(1)  # NaN if any entry is
    usable = (largest > 0) & largest.isfinite()
    age[due[~usable]] = 0
    index = due[usable]
    if not len(index):
        return
    # Singular vectors do not depend on the scale, but the decomposition loses them where squares vanish or overflow.
    chosen = chosen[usable].div_(largest[usable][:, None, None])
    u, _, vh = torch.linalg.svd(chosen, full_matrices=False)
    basis[index] = u if _wide(momentum) else vh.mT


def _rotated(matrices: Tensor, basis: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, m, n) in the axes of the basis (B, k, k), in the basis' dtype; with its transpose, the way back."""
    matrices = matrices.to(basis.dtype)
    return torch.matmul(*((basis.mT, matrices) if _wide(matrices) else (matrices, basis)), out=out)


def _wide(matrices: Tensor) -> bool:
    return matrices.shape[-2] < matrices.shape[-1]
