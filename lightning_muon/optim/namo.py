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
    """What the two rules share: all but which entries of a matrix have a step size in common."""

    _summed: ClassVar[tuple[int, ...]]
    """Dimensions of (B, m, n) that one number of the adaptation covers."""

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
        return ratio.nan_to_num(nan=0.0)  # of inf / inf, where squares overflow


class NAMO(_NoiseAdaptiveMuon):
    r"""NAMO: Muon whose step is as long as the momentum, measured by the root mean square of the gradients before.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        v_t &= \mu_2 v_{t-1} + (1 - \mu_2)\, \|G_t\|_F^2 \\
        O_t &= \operatorname{orthogonalize}(\tilde M_t) \\
        \alpha_t &= \frac{\sqrt{1 - \mu_2^t}}{1 - \mu^t}\, \frac{\|\tilde M_t\|_F}{\sqrt{v_t} + \epsilon} \\
        W_t &= (1 - \lambda \min(\eta\alpha_t, 1))\, W_{t-1} - \min(\eta\, s(m, n)\, \alpha_t, 1)\, O_t

    One number :math:`\alpha` a matrix: 1 for a constant gradient, where NAMO is Muon, and about
    :math:`\sqrt{(1 - \mu) / (1 + \mu)}`, 0.16 by default, where gradients are nothing but noise. In the long run it
    cannot exceed 1.7 (Cauchy-Schwarz, default :math:`\mu, \mu_2`). All singular values of the update stay equal, and
    gradients k times as large give the same update, as long as their norms are well above :math:`\epsilon` and below
    1e19, where squares overflow in float32 and the matrix stops for good, as in AdamW.

    Source: Zhang, Liu & Schaeffer, arXiv 2602.17080. Paper and authors' code differ: the code looks ahead by default,
    with which a constant gradient starts at :math:`\alpha = 1.95` instead of 1, so that ``nesterov`` is off here; it
    adds :math:`\epsilon` outside the root and caps both rates at 1, as done here. Zero gradients mean
    :math:`\alpha = 0`: neither step nor decay.

    State: ``momentum_buffer``, one element per weight; ``second_moment`` :math:`v`, ``adaptation`` :math:`\alpha` as
    the last step used it, before the caps, and ``step``, a number a matrix each.

    Cost: that of Muon and two norms. Prefer it to Muon where gradient noise changes over the run, as with small
    batches, and for schedules that do not fall to zero: the step shrinks by itself as noise takes over.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`. The authors' are near 0.01, several times what suits Muon with the same scale,
            because :math:`\alpha` shrinks the step.
        weight_decay: :math:`\lambda`, decoupled but scaled by :math:`\alpha` like the step.
        momentum: :math:`\mu`, from 0 to below 1.
        beta2: :math:`\mu_2`, from 0 to below 1.
        nesterov: look one step ahead.
        eps: :math:`\epsilon`, above 0.
        method: how to orthogonalize; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the method's own.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None to choose by device.
        state_dtype: dtype of the momentum; None for each parameter's own. The numbers are float32 at least.
        nonfinite: what NaN or infinity in a gradient does; see :class:`MatrixOptimizer`.

    Raises:
        ValueError: for an argument out of range, and for a parameter that cannot be read as matrices.
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
    r"""NAMO-D: NAMO with a step size for each column, that is for each input of a layer.

    .. math::
        V_{t,j} &= \mu_2 V_{t-1,j} + (1 - \mu_2)\, \|G_{t,:j}\|^2 \\
        a_{t,j} &= \|\tilde M_{t,:j}\| / (\sqrt{V_{t,j}} + \epsilon), \qquad \bar a_t = \operatorname{mean}_j a_{t,j} \\
        \alpha_{t,j} &= \frac{\sqrt{1 - \mu_2^t}}{1 - \mu^t}\,
        \operatorname{clip}(a_{t,j},\; c\,\bar a_t,\; \bar a_t / c) \\
        W_{t,:j} &= (1 - \lambda \min(\eta\alpha_{t,j}, 1))\, W_{t-1,:j}
        - \min(\eta\, s(m, n)\, \alpha_{t,j}, 1)\, O_{t,:j}

    with :math:`\tilde M` and :math:`O` of :class:`NAMO`. The clamp c keeps the step sizes of the columns within a
    factor :math:`1 / c^2` of each other; with c = 1 all share the mean and the update is a multiple of :math:`O`, as in
    NAMO. The smaller c, the more it adapts and the less it orthogonalizes.

    Source: arXiv 2602.17080. As in the authors' code the mean is over finite entries and both rates are capped at 1.
    Their runs used c from 0.1 to 0.9.

    State: ``momentum_buffer``, one element per weight; ``second_moment`` V and ``adaptation`` :math:`\alpha_j`, a
    number a column each; ``step``, a number a matrix.

    Cost: that of Muon and two norms. Prefer it to NAMO where the inputs of a layer differ in how often they carry a
    signal.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`; see :class:`NAMO`.
        weight_decay: :math:`\lambda`, decoupled but scaled by :math:`\alpha_j` like the step.
        momentum: :math:`\mu`, from 0 to below 1.
        beta2: :math:`\mu_2`, from 0 to below 1.
        nesterov: look one step ahead.
        eps: :math:`\epsilon`, above 0.
        clamp: c, above 0 and at most 1.
        method: how to orthogonalize; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the method's own.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None to choose by device.
        state_dtype: dtype of the momentum; None for each parameter's own. The numbers are float32 at least.
        nonfinite: what NaN or infinity in a gradient does; see :class:`MatrixOptimizer`.

    Raises:
        ValueError: for an argument out of range, and for a parameter that cannot be read as matrices.
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
    """(B,) or (B, n) as a view (B, 1, 1) or (B, 1, n)."""
    return numbers.view(numbers.shape[0], 1, -1)


def _capped(adaptation: Tensor, rate: float | Tensor) -> Tensor:
    """min(adaptation, 1 / rate), so that rate times it is at most 1; a rate of 0 caps nothing."""
    rate = rate.to(adaptation) if isinstance(rate, Tensor) else adaptation.new_full((), rate)
    return torch.minimum(adaptation, rate.reciprocal())
