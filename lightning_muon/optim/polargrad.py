"""PolarGrad: the polar factor of the momentum, times its nuclear norm."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.optim.arguments import check_choice
from lightning_muon.optim.matrix import NonFinite
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer

PolarOrder: TypeAlias = Literal["momentum_first", "polar_first"]


class PolarGrad(OrthogonalizingOptimizer):
    r"""PolarGrad: Muon with a step proportional to the size of the gradient, so that it vanishes at a minimum.

    With ``order="momentum_first"``

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t, \qquad U_t = \operatorname{orthogonalize}(M_t) \\
        \nu_t &= \langle M_t, U_t \rangle \quad (= \|M_t\|_* \text{ where the polar factor is exact}) \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, \nu_t U_t

    and with ``order="polar_first"``

    .. math::
        U_t &= \operatorname{orthogonalize}(G_t), \qquad \nu_t = \langle G_t, U_t \rangle \\
        M_t &= \mu M_{t-1} + (1 - \mu)\, U_t, \qquad W_t = (1 - \eta\lambda)\, W_{t-1} - \eta\, \nu_t M_t.

    :math:`\nu U` is the steepest descent step in the spectral norm, with its length; Muon keeps only the direction.
    Gradients k times as large give updates k times as large. There is no Nesterov momentum and no shape scale, and
    **learning rates of Muon or AdamW do not carry over**: start with such a learning rate divided by the nuclear norm
    of a typical momentum. Gradient clipping and the scale of the loss matter, as in SGD.

    Source: Lau, Long & Su, arXiv 2505.21799, and the authors' code (github.com/timlautk/polargrad). Their code runs two
    iterations of QDWH by default, so that :math:`U` is approximate. Here the default runs to convergence, as their code
    does with ``inner_steps=10``. ``steps=2`` differs from their two iterations: it starts from another lower bound of
    the singular values, so that :math:`U` has other singular values. With every ``method``, :math:`\nu` is computed
    with the :math:`U` of the update.

    State: ``momentum_buffer``, one element per weight.

    Cost: one orthogonalization, as in Muon, and an inner product. The default ``method="qdwh"`` is exact and takes
    several times as long as Newton-Schulz. Prefer it for ill-conditioned problems with little noise, such as matrix
    factorization and regression, where Muon's steps of constant length circle around the minimum unless the learning
    rate decays.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1.
        order: ``"momentum_first"`` averages gradients, ``"polar_first"`` polar factors.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device and
            the method.
        state_dtype: dtype of the momentum; None for the dtype of each parameter.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        order: PolarOrder = "momentum_first",
        method: OrthogonalizationMethod = "qdwh",
        steps: int | None = None,
        cautious: bool = False,
        orthogonalize_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "order": order,
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, options, lr_scale="none", cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_choice(group, "order", get_args(PolarOrder))

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        if group["order"] == "momentum_first":
            polar = self.orthogonalize(self.momentum(grad, state, group), group)
            return polar.mul_(_inner(state["momentum_buffer"], polar))
        polar = self.orthogonalize(grad, group, overwrite=False)
        nuclear = _inner(grad, polar)
        average = state["momentum_buffer"].lerp_(polar, 1 - group["momentum"])
        return polar.copy_(average).mul_(nuclear)


def _inner(matrices: Tensor, polar: Tensor) -> Tensor:
    """Inner products (B, 1, 1) of two stacks.

    The elements of a polar factor are at most about 1, so that the products overflow no sooner than the matrices.
    """
    wide = torch.promote_types(matrices.dtype, torch.float32)
    return (matrices.to(wide) * polar).sum(dim=(1, 2), keepdim=True, dtype=wide)
