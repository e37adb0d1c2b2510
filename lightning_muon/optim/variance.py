"""MuonNSR and MuonVS: Muon with a momentum that is divided by its noise, element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.optim.arguments import bias_correction, check_non_negative, check_positive, dtype_for_squares
from lightning_muon.optim.matrix import LRScale, NonFinite
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer


class _VarianceAdaptiveMuon(OrthogonalizingOptimizer):
    """Common base class of both rules. A subclass provides the denominator."""

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_positive(group, "eps")

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        step_dtype = torch.promote_types(stack.dtype, torch.float32)
        return {
            **super().init_state(stack, group),
            "variance": torch.zeros_like(stack, dtype=dtype_for_squares(stack.dtype)),
            "step": stack.new_zeros(stack.shape[0], dtype=step_dtype),
        }

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return self.orthogonalize(self._adapted_momentum(grad, state, group), group)

    def _adapted_momentum(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """The look-ahead divided by its denominator. Overwrites ``grad`` if that is float32 or float64."""
        beta = group["momentum"]
        buffer, variance = state["momentum_buffer"], state["variance"]
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        deviation = buffer - wide  # of the gradient from the average before this step
        variance.mul_(beta).addcmul_(deviation, deviation, value=beta * (1 - beta))
        buffer.lerp_(grad, 1 - beta)
        correction = bias_correction(state["step"].add_(1), beta)
        look_ahead = wide.addcdiv_(buffer, correction, value=beta / (1 - beta))
        corrected = torch.div(variance, correction, out=deviation)
        return look_ahead.div_(self._denominator(look_ahead, corrected, group))

    def _denominator(self, look_ahead: Tensor, variance: Tensor, group: dict[str, Any]) -> Tensor:
        """The denominator of the look-ahead. It may overwrite ``variance``."""
        raise NotImplementedError


class MuonNSR(_VarianceAdaptiveMuon):
    r"""Muon-NSR: shrinks noisy elements of the momentum before it orthogonalizes the momentum.

    .. math::
        \Gamma_t &= \mu \Gamma_{t-1} + \mu (1 - \mu)\, (M_{t-1} - G_t)^2 \\
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \hat M_t &= M_t / (1 - \mu^t), \qquad \hat\Gamma_t = \Gamma_t / (1 - \mu^t) \\
        \tilde M_t &= G_t + \tfrac{\mu}{1 - \mu}\, \hat M_t \\
        D_t &= \tilde M_t \oslash \bigl(\sqrt{\tilde M_t^2 + \gamma\, \hat\Gamma_t} + \epsilon\bigr) \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, s(m, n) \operatorname{orthogonalize}(D_t)

    :math:`\Gamma` is the running variance of the gradient: :math:`M^2 + \Gamma` is Adam's second moment with equal
    decay rates. Source: arXiv 2601.14603 and the authors' code (github.com/jingru-lee/Variance-Adaptive-Muon). In their
    code :math:`\epsilon` is outside the root, as here; their docstring has it inside. The look-ahead :math:`\tilde M`
    is part of the rule. The first step orthogonalizes the signs of the gradient.

    Prefer it to Muon if gradients are noisy, as with small batches. It needs the memory of AdamW.

    The direction does not depend on the scale of gradients from about a hundred :math:`\epsilon` to about 1e17. Below,
    :math:`\epsilon` dominates the root, and the rule becomes Muon with Nesterov momentum. Squares of elements above
    1e18 overflow in float32: such elements do not change, and with gradients above 1e20 they never change again, as in
    Adam. With a ``momentum`` of 0 the rule orthogonalizes the signs of the gradient.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1, for the average and the variance.
        gamma: :math:`\gamma`, weight of the noise, 0 or more. The authors' default is 10; their larger runs use 1000.
        eps: :math:`\epsilon`, above 0.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`. The authors use ``"match_rms_adamw"`` and
            ``"original"`` in different runs.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the state; None for the dtype of each parameter.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer`` and ``variance``, one element per weight each, and ``step``, one per matrix. ``variance``
    is float32 if ``state_dtype`` is float16, where squares underflow.

    Cost: that of Muon and about six passes over the gradient.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        gamma: float = 10.0,
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
            "gamma": gamma,
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
        check_non_negative(group, "gamma")

    def _denominator(self, look_ahead: Tensor, variance: Tensor, group: dict[str, Any]) -> Tensor:
        return variance.mul_(group["gamma"]).addcmul_(look_ahead, look_ahead).sqrt_().add_(group["eps"])


class MuonVS(_VarianceAdaptiveMuon):
    r"""Muon-VS: divides the momentum by its standard deviation, element by element, and orthogonalizes it.

    It is :class:`MuonNSR` with

    .. math::
        D_t = \tilde M_t \oslash \bigl(\sqrt{\hat\Gamma_t} + \epsilon\bigr),

    the limit of that rule for large :math:`\gamma`, without an argument to tune. Source: arXiv 2601.14603 and the
    authors' code (github.com/jingru-lee/Variance-Adaptive-Muon), which has an argument ``alpha`` here that it ignores.

    Prefer it to :class:`MuonNSR` to have one argument less. An element whose gradient hardly varies becomes large, and
    its size depends on rounding. If the variance is 0, as with a ``momentum`` of 0, the element is divided by
    :math:`\epsilon` alone, which stays finite for gradients up to 1e29.

    The direction does not depend on the scale of gradients from about a hundred :math:`\epsilon` to about 1e19. Below,
    :math:`\epsilon` dominates the root, and the rule becomes Muon with Nesterov momentum. A variance above 3e38, from
    gradients near 1e20, overflows in float32: such elements never change again, as in Adam.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1, for the average and the variance.
        eps: :math:`\epsilon`, above 0.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the state; None for the dtype of each parameter.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer`` and ``variance``, one element per weight each, and ``step``, one per matrix. ``variance``
    is float32 if ``state_dtype`` is float16, where squares underflow.

    Cost: that of Muon and about five passes over the gradient.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
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
            "eps": eps,
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, defaults, lr_scale=lr_scale, cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def _denominator(self, look_ahead: Tensor, variance: Tensor, group: dict[str, Any]) -> Tensor:
        return variance.sqrt_().add_(group["eps"])
