"""AdaMuon: Muon with Adam's second moment of the orthogonalized momentum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.linalg.scale import normalized
from lightning_muon.optim.arguments import check_choice, check_fraction, check_positive, dtype_for_squares
from lightning_muon.optim.matrix import LRScale, NonFinite
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer


class AdaMuon(OrthogonalizingOptimizer):
    r"""AdaMuon: orthogonalizes the sign of the momentum, and divides each element by its running root mean square.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        O_t &= \operatorname{orthogonalize}(\operatorname{sign}(\tilde M_t)) \quad\text{with sign, else}\quad
        \operatorname{orthogonalize}(\tilde M_t) \\
        V_t &= \beta_2 V_{t-1} + (1 - \beta_2)\, O_t \odot O_t \\
        \hat O_t &= O_t \oslash (\sqrt{V_t} + \epsilon) \\
        D_t &= \sqrt{\min(m, n)}\; \hat O_t / \|\hat O_t\|_F \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, s(m, n)\, D_t

    Source: arXiv 2507.11005 and the authors' code (github.com/Chongjie-Si/AdaMuon). With the default ``lr_scale`` the
    root mean square of the update is 0.2 exactly, as in the paper. The paper uses one :math:`\beta` for both averages,
    writes the first as :math:`\beta M + G` (the same after the sign) and has no Nesterov momentum; the authors' code
    has it. The paper and the authors' code take the sign; several libraries do not, which is ``sign=False``. There is
    no bias correction, because a factor common to all elements cancels in the norm.

    Prefer it to Muon if the elements of one matrix differ much in their noise, and if the memory allows a second
    element of state per weight. The update of the first step is a matrix of signs, as with Adam.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1.
        beta2: :math:`\beta_2`, decay rate of the average of squares, from 0 to below 1. With 0 every update is a
            matrix of signs.
        nesterov: use Nesterov momentum, which looks one step ahead.
        sign: orthogonalize the signs of the momentum instead of the momentum.
        eps: :math:`\epsilon`, above 0; small compared with the elements of an orthogonal matrix, about
            :math:`1/\sqrt{\max(m, n)}`.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the state; None for the dtype of each parameter.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer`` and ``second_moment``, one element per weight each: the memory of AdamW.
    ``second_moment`` is float32 if ``state_dtype`` is float16, where squares underflow.

    Cost: that of Muon, and about five passes over the update.

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
        sign: bool = True,
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
            "sign": sign,
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
        check_choice(group, "sign", (False, True))
        check_positive(group, "eps")

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        second_moment = torch.zeros_like(stack, dtype=dtype_for_squares(stack.dtype))
        return {**super().init_state(stack, group), "second_moment": second_moment}

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        momentum = self.momentum(grad, state, group)
        if group["sign"]:
            momentum = _signs(momentum)
        factors = self.orthogonalize(momentum, group)
        factors = factors.to(torch.promote_types(factors.dtype, torch.float32))
        second_moment = state["second_moment"]
        second_moment.mul_(group["beta2"]).addcmul_(factors, factors, value=1 - group["beta2"])
        factors.div_(second_moment.to(factors.dtype).sqrt().add_(group["eps"]))
        return normalized(factors, 1.0, factors.dtype, overwrite=True).mul_(math.sqrt(min(factors.shape[-2:])))


def _signs(momentum: Tensor) -> Tensor:
    """Replace ``momentum`` by its signs; a matrix with NaN or infinity becomes NaN, because signs would hide it."""
    entries = momentum.flatten(1)
    zero_or_nan = entries.amax(dim=1).mul_(0).add_(entries.amin(dim=1).mul_(0))
    return momentum.sign_().add_(zero_or_nan[:, None, None])
