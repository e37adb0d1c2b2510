"""NorMuon: Muon with rows of equal update size."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.linalg.scale import normalized
from lightning_muon.optim.arguments import check_choice, check_fraction, check_positive
from lightning_muon.optim.matrix import LRScale, NonFinite
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer


class NorMuon(OrthogonalizingOptimizer):
    r"""NorMuon: divides each row of the orthogonalized momentum by the running root mean square of that row.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        O_t &= \operatorname{orthogonalize}(\tilde M_t) \\
        v_{t,i} &= \beta_2 v_{t-1,i} + (1 - \beta_2)\, \tfrac1n \textstyle\sum_j O_{t,ij}^2 \\
        \hat O_{t,ij} &= O_{t,ij} / (\sqrt{v_{t,i}} + \epsilon) \\
        D_t &= c\, \hat O_t / \|\hat O_t\|_F, \qquad c = \sqrt{\min(m, n)} \text{ (rms) or } \|O_t\|_F
        \text{ (preserve)} \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, s(m, n)\, D_t

    Source: arXiv 2510.05491 and the authors' code (github.com/zichongli5/NorMuon). The paper has no Nesterov momentum,
    and the root mean square of ``norm="rms"``. The code has Nesterov momentum, keeps the norm (``norm="preserve"``) and
    scales as ``lr_scale="original"``. The defaults here are the Nesterov momentum of the code and the norm of the
    paper. Neither corrects the bias of ``v``: a factor common to all rows cancels in the norm.

    Prefer it to Muon if some output units get far smaller updates than others, as in tall matrices (more outputs than
    inputs). The rows of a wide or square orthogonal matrix have equal norms. There ``axis="row"`` only corrects the
    inexact orthogonalization; ``axis="long"`` normalizes the columns of wide matrices instead.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1.
        beta2: :math:`\beta_2`, decay rate of the mean squares, from 0 to below 1. With 0 all rows of each update have
            the same norm.
        nesterov: use Nesterov momentum, which looks one step ahead.
        norm: ``"rms"`` gives the update the Frobenius norm of an orthogonal matrix: with the default ``lr_scale`` its
            root mean square is 0.2 exactly. ``"preserve"`` keeps the norm of :math:`O_t`.
        axis: ``"row"`` keeps one mean square per row, as published; ``"long"`` one per row if :math:`m \ge n`, else
            one per column.
        eps: :math:`\epsilon`, above 0.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the momentum; None for the dtype of each parameter.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight, and ``second_moment``, one per row (or column), in float32 at
    least.

    Cost: that of Muon and three passes over the update.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        norm: Literal["rms", "preserve"] = "rms",
        axis: Literal["row", "long"] = "row",
        eps: float = 1e-8,
        method: OrthogonalizationMethod = "jordan",
        steps: int | None = None,
        lr_scale: LRScale = "match_rms_adamw",
        cautious: bool = False,
        orthogonalize_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "nesterov": nesterov,
            "norm": norm,
            "axis": axis,
            "eps": eps,
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, defaults, lr_scale=lr_scale, cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_fraction(group, "beta2")
        check_choice(group, "norm", ("rms", "preserve"))
        check_choice(group, "axis", ("row", "long"))
        check_positive(group, "eps")

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        lines = stack.shape[_axis(stack, group["axis"])]
        dtype = torch.promote_types(stack.dtype, torch.float32)
        second_moment = stack.new_zeros(stack.shape[0], lines, dtype=dtype)
        return {**super().init_state(stack, group), "second_moment": second_moment}

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        factors = self.orthogonalize(self.momentum(grad, state, group), group)
        factors = factors.to(torch.promote_types(factors.dtype, torch.float32))
        norm: float | Tensor = math.sqrt(min(factors.shape[-2:]))
        if group["norm"] == "preserve":
            norm = torch.linalg.vector_norm(factors, dim=(-2, -1), keepdim=True)
        across = -1 if _axis(factors, group["axis"]) == -2 else -2
        mean_square = torch.linalg.vector_norm(factors, dim=across).square_().div_(factors.shape[across])
        second_moment = state["second_moment"].lerp_(mean_square, 1 - group["beta2"])
        factors.div_(second_moment.sqrt().add_(group["eps"]).unsqueeze(across))
        return normalized(factors, 1.0, factors.dtype, overwrite=True).mul_(norm)


def _axis(stack: Tensor, axis: str) -> int:
    """The dimension of (B, m, n) that has one mean square per index."""
    return -2 if axis == "row" or stack.shape[-2] >= stack.shape[-1] else -1
