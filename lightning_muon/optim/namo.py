"""NAMO and NAMO-D: Muon with a step size that adapts to the noise of the gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.optim.arguments import bias_correction, check_fraction, check_positive
from lightning_muon.optim.matrix import LRScale, NonFinite, shape_scale
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer


class _NoiseAdaptiveMuon(OrthogonalizingOptimizer):
    """Common base class of both rules. A subclass says which elements of a matrix share a step size."""

    _summed: ClassVar[tuple[int, ...]]
    """Dimensions of (B, m, n) whose elements share one step size."""

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_fraction(group, "beta2")
        check_positive(group, "eps")

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        numbers = stack.new_zeros(stack.shape[0], dtype=torch.promote_types(stack.dtype, torch.float32))
        return {
            **super().init_state(stack, group),
            "second_moment": numbers,
            "adaptation": numbers.clone(),
            "step": numbers.clone(),
        }

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        step, second_moment = state["step"].add_(1), _broadcast(state["second_moment"])
        second_moment.lerp_(self._norm(grad, step.dtype).square_(), 1 - group["beta2"])
        momentum = self.momentum(grad, state, group)
        ratio = self._norm(momentum, step.dtype).div_(second_moment.sqrt().add_(group["eps"]))
        correction = bias_correction(step, group["beta2"]).sqrt() / bias_correction(step, group["momentum"])
        adaptation = _broadcast(state["adaptation"])
        adaptation.copy_(self._bounded(ratio, group) * correction)
        rate = group["lr"] * shape_scale(group["lr_scale"], grad.shape[1], grad.shape[2])
        factors = self.orthogonalize(momentum, group)
        return factors.mul_(_capped(adaptation, rate))

    def decay_factor(self, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return _capped(_broadcast(state["adaptation"]), group["lr"])

    def _norm(self, matrices: Tensor, dtype: torch.dtype) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(matrices, dim=self._summed, keepdim=True, dtype=dtype)
        return norm

    def _bounded(self, ratio: Tensor, group: dict[str, Any]) -> Tensor:
        return ratio.nan_to_num(nan=0.0)  # inf / inf is NaN, if squares overflow


class NAMO(_NoiseAdaptiveMuon):
    r"""NAMO: Muon with a step size per matrix: norm of the momentum over root mean square norm of the gradients.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        v_t &= \mu_2 v_{t-1} + (1 - \mu_2)\, \|G_t\|_F^2 \\
        O_t &= \operatorname{orthogonalize}(\tilde M_t) \\
        \alpha_t &= \frac{\sqrt{1 - \mu_2^t}}{1 - \mu^t}\, \frac{\|\tilde M_t\|_F}{\sqrt{v_t} + \epsilon} \\
        W_t &= (1 - \lambda \min(\eta\alpha_t, 1))\, W_{t-1} - \min(\eta\, s(m, n)\, \alpha_t, 1)\, O_t

    Each matrix has one :math:`\alpha`. It is 1 for a constant gradient, where NAMO equals Muon, and about
    :math:`\sqrt{(1 - \mu) / (1 + \mu)}`, 0.16 by default, if gradients are pure noise. In the long run it cannot exceed
    1.7 (Cauchy-Schwarz, default :math:`\mu, \mu_2`). All singular values of the update stay equal. The scale of the
    gradients does not matter while their norms are well above :math:`\epsilon` and below 1e19. Above, squares overflow
    in float32, and the matrix never changes again, as in AdamW.

    Source: Zhang, Liu & Schaeffer, arXiv 2602.17080. The authors' code differs from the paper. It uses Nesterov
    momentum by default, which starts with :math:`\alpha = 1.95` instead of 1 for a constant gradient; therefore
    ``nesterov`` is False here. It adds :math:`\epsilon` outside the root and caps both :math:`\eta\alpha` and the step
    size at 1, as this class does. With zero gradients :math:`\alpha = 0`, without step and decay.

    State: ``momentum_buffer``, one element per weight; ``second_moment`` :math:`v`, ``adaptation`` (the
    :math:`\alpha` of the last step, before the caps) and ``step``, one element per matrix each.

    Cost: that of Muon and two norms. Prefer it to Muon if gradient noise changes during training, as with small
    batches, and for schedules that do not end at zero: steps become smaller when noise dominates.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`. The authors use about 0.01, several times Muon's learning rate with the same
            scale, because :math:`\alpha` shrinks the step.
        weight_decay: :math:`\lambda`, decoupled but scaled by :math:`\alpha` like the step.
        momentum: :math:`\mu`, from 0 to below 1.
        beta2: :math:`\mu_2`, from 0 to below 1.
        nesterov: use Nesterov momentum, which looks one step ahead.
        eps: :math:`\epsilon`, above 0.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the momentum; None for the dtype of each parameter. All other state is float32 at least.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    _summed = (1, 2)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.99,
        nesterov: bool = False,
        eps: float = 1e-8,
        method: OrthogonalizationMethod = "jordan",
        steps: int | None = None,
        lr_scale: LRScale = "match_rms_adamw",
        cautious: bool = False,
        orthogonalize_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "nesterov": nesterov,
            "eps": eps,
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, options, lr_scale=lr_scale, cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )


class NAMOD(_NoiseAdaptiveMuon):
    r"""NAMO-D: NAMO with a step size per column, that is per input of a layer.

    .. math::
        V_{t,j} &= \mu_2 V_{t-1,j} + (1 - \mu_2)\, \|G_{t,:j}\|^2 \\
        a_{t,j} &= \|\tilde M_{t,:j}\| / (\sqrt{V_{t,j}} + \epsilon), \qquad \bar a_t = \operatorname{mean}_j a_{t,j} \\
        \alpha_{t,j} &= \frac{\sqrt{1 - \mu_2^t}}{1 - \mu^t}\,
        \operatorname{clip}(a_{t,j},\; c\,\bar a_t,\; \bar a_t / c) \\
        W_{t,:j} &= (1 - \lambda \min(\eta\alpha_{t,j}, 1))\, W_{t-1,:j}
        - \min(\eta\, s(m, n)\, \alpha_{t,j}, 1)\, O_{t,:j}

    with :math:`\tilde M` and :math:`O` of :class:`NAMO`. The clamp c keeps the step sizes of the columns within a
    factor :math:`1 / c^2` of each other. With c = 1 all columns have the mean step size, and the update is a multiple
    of :math:`O`, as in NAMO. With a smaller c the step sizes adapt more, and the update is less orthogonal.

    Source: arXiv 2602.17080. As in the authors' code, the mean is over finite elements, and :math:`\eta\alpha_j` and
    the step size are capped at 1. The authors used c from 0.1 to 0.9.

    State: ``momentum_buffer``, one element per weight; ``second_moment`` V and ``adaptation`` :math:`\alpha_j`, one
    element per column each; ``step``, one per matrix.

    Cost: that of Muon and two norms. Prefer it to NAMO if some inputs of a layer are active much more often than
    others.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`; see :class:`NAMO`.
        weight_decay: :math:`\lambda`, decoupled but scaled by :math:`\alpha_j` like the step.
        momentum: :math:`\mu`, from 0 to below 1.
        beta2: :math:`\mu_2`, from 0 to below 1.
        nesterov: use Nesterov momentum, which looks one step ahead.
        eps: :math:`\epsilon`, above 0.
        clamp: c, above 0 and at most 1.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the momentum; None for the dtype of each parameter. All other state is float32 at least.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    _summed = (1,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.99,
        nesterov: bool = False,
        eps: float = 1e-8,
        clamp: float = 0.75,
        method: OrthogonalizationMethod = "jordan",
        steps: int | None = None,
        lr_scale: LRScale = "match_rms_adamw",
        cautious: bool = False,
        orthogonalize_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "nesterov": nesterov,
            "eps": eps,
            "clamp": clamp,
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, options, lr_scale=lr_scale, cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_positive(group, "clamp")
        if group["clamp"] > 1:
            raise ValueError(
                f"clamp must be above 0 and at most 1, got {group['clamp']!r}: it is the smallest ratio of a column's "
                "step size to the mean."
            )

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super().init_state(stack, group)
        columns = state["step"].new_zeros(stack.shape[0], stack.shape[2])
        return {**state, "second_moment": columns, "adaptation": columns.clone()}

    def _bounded(self, ratio: Tensor, group: dict[str, Any]) -> Tensor:
        finite = ratio.isfinite()
        mean = ratio.where(finite, 0.0).sum(dim=2, keepdim=True) / finite.sum(dim=2, keepdim=True).clamp_(min=1)
        return super()._bounded(ratio, group).clamp(min=group["clamp"] * mean, max=mean / group["clamp"])


def _broadcast(numbers: Tensor) -> Tensor:
    """View (B,) as (B, 1, 1), or (B, n) as (B, 1, n)."""
    return numbers.view(numbers.shape[0], 1, -1)


def _capped(adaptation: Tensor, rate: float | Tensor) -> Tensor:
    """min(adaptation, 1 / rate), so that rate * adaptation is at most 1. A rate of 0 does not cap."""
    rate = rate.to(adaptation) if isinstance(rate, Tensor) else adaptation.new_full((), rate)
    return torch.minimum(adaptation, rate.reciprocal())
