"""Muown: Muon for the directions of the rows, Adam for their lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.optim.arguments import bias_correction, check_betas, check_positive
from lightning_muon.optim.matrix import LRScale, NonFinite, shape_scale
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer
from lightning_muon.optim.weight_aware import WeightAwareOptimizer, WeightReader

_SHORTEST = 1e-12
"""Lower bound of the length of a row, so that rows of zeros can grow."""


class Muown(WeightAwareOptimizer, OrthogonalizingOptimizer):
    r"""Muown: splits each row of the weights into magnitude and direction. Adam updates the first, Muon the second.

    Row :math:`i` of the weights is :math:`W_i = g_i u_i` with :math:`u_i = v_i / \|v_i\|`: a magnitude and a direction
    for each output unit. Their gradients follow from the gradient of W:

    .. math::
        \gamma_i &= \langle G_i, u_i \rangle, \qquad
        \Gamma_i = \frac{g_i}{\|v_i\|} (G_i - \gamma_i u_i) \\
        M_t &= \mu M_{t-1} + (1 - \mu)\, \Gamma \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, \Gamma \quad\text{with nesterov, else}\quad M_t \\
        v_t &= v_{t-1} - \eta\, s(m, n) \operatorname{orthogonalize}(\tilde M_t) \\
        g_t &= g_{t-1} - \eta\, \hat p_t / (\sqrt{\hat q_t} + \epsilon) \\
        W_{t,i} &= g_{t,i}\, v_{t,i} / \|v_{t,i}\| - \eta\lambda\, W_{t-1,i}

    where :math:`\hat p` and :math:`\hat q` are the bias-corrected averages of :math:`\gamma` and :math:`\gamma^2`, as
    in Adam. At the start :math:`v = W` and :math:`g_i = \|W_i\|`. After a step with weight decay, :math:`g_i` is set to
    the length of row i, with its sign, and the direction is that of the decayed row. Because :math:`\Gamma_i` is
    orthogonal to :math:`v_i`, the length of :math:`v_i` tends to grow, which makes later turns smaller, as with weight
    normalization.

    Only the length of v is stored; its direction is read from the weights. So the rule follows weights that were
    changed from outside, by loading or averaging: if the length of a row differs from its magnitude by more than
    rounding (1 part in 128 in bfloat16, 1e-7 in float32), the magnitude becomes that length, with the same sign. The
    averages stay, as in every optimizer. In float16 a row of zeros stays zero, because its first steps are too small
    for that format; in bfloat16 and float32 it can grow.

    Source: Lion et al., arXiv 2605.10797, and the authors' code (github.com/kcc-lion/muown). The defaults are those of
    the authors, except for the learning rate (theirs is 3e-4). Their weight decay is 0 too, because the method should
    keep the norms without it. Three things differ. First, a magnitude that has crossed zero keeps its sign when it is
    read again after a decay; in their code it becomes positive, which contradicts the averages. Second, a weight three
    times as tall as wide is one matrix here unless its layout splits it; in their code it is always a fused query, key
    and value. Third, the authors' distributed class also shrinks the magnitudes first, and so decays more than their
    other class; this class follows the other one. NVIDIA's Emerging-Optimizers has no Nesterov momentum and decays only
    the magnitudes.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta` of magnitudes and directions.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1, for the directions.
        nesterov: use Nesterov momentum for the directions, which looks one step ahead.
        magnitude_betas: decay rates of the averages :math:`p` and :math:`q`, from 0 to below 1.
        eps: :math:`\epsilon`, above 0.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)` of the directions; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the momentum; None for the dtype of each parameter. State with one element per row is
            float32 at least, so that small changes of length add up for parameters of less precision.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight; ``magnitude``, ``direction_norm``, ``magnitude_exp_avg`` and
    ``magnitude_exp_avg_sq``, one element per row each; ``step``, one per matrix. That is hardly more than Muon's
    memory.

    Cost: that of Muon, and about six passes over weights and gradient.

    Prefer it to Muon if the spectral norm of the weights grows slowly in long runs, or if results depend much on weight
    decay and learning rate. That growth comes from the lengths of the rows, which have their own adaptive step here.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> optimizer = Muown([model[0].weight], lr=1e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        magnitude_betas: tuple[float, float] = (0.9, 0.95),
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
            "nesterov": nesterov,
            "magnitude_betas": magnitude_betas,
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
        check_betas(group, "magnitude_betas")
        check_positive(group, "eps")

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        lengths = _row_lengths(stack.to(torch.promote_types(stack.dtype, torch.float32)))
        return {
            **super().init_state(stack, group),
            "magnitude": lengths,
            "direction_norm": lengths.clone(),
            "magnitude_exp_avg": torch.zeros_like(lengths),
            "magnitude_exp_avg_sq": torch.zeros_like(lengths),
            "step": lengths.new_zeros(lengths.shape[0]),
        }

    def next_weights(
        self, read_weights: WeightReader, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        lr: float | Tensor = group["lr"]
        weights = read_weights()
        magnitude, norm = state["magnitude"], state["direction_norm"]
        lengths = _row_lengths(weights).copysign_(magnitude)  # weights / lengths are the directions u
        # Rounding to the parameter's dtype changes the length of a row by less than eps. Larger changes are external.
        changed = (lengths - magnitude).abs() > torch.finfo(read_weights.dtype).eps * magnitude.abs()
        magnitude.copy_(torch.where(changed, lengths, magnitude))

        gradient = grad.to(weights.dtype)
        along = (gradient * weights).sum(dim=2) / lengths
        gradient.addcmul_(weights, (along / lengths).unsqueeze(2), value=-1).mul_((magnitude / norm).unsqueeze(2))
        del weights
        turn = self.orthogonalize(self.momentum(gradient.to(grad.dtype), state, group), group)
        del grad, gradient  # frees as much memory as the weights need, which are read again
        weights = read_weights()
        turn = turn.to(weights.dtype)
        rate = lr * shape_scale(group["lr_scale"], *weights.shape[1:])
        directions = turn.mul_(-rate).addcmul_(weights, (norm / lengths).unsqueeze(2))
        norm.copy_(_row_lengths(directions))

        # Rounding makes the rows of parameters a little longer or shorter than their magnitudes. The base corrects
        # that. With a learning rate of 0 the weights do not change at all.
        moves = lr != 0
        base = weights.mul_((1 + moves * (magnitude / lengths - 1)).unsqueeze(2))
        magnitude -= lr * self._magnitude_step(along, state, group)
        step = directions.mul_((-magnitude / norm).unsqueeze(2)).add_(base).mul_(moves)
        amount = lr * group["weight_decay"]
        if not (isinstance(amount, (int, float)) and amount == 0.0):
            self.decay_(base, step, amount, group)
            # Computed from the weights before rounding, so that small decays add up in every dtype.
            magnitude += moves * (_row_lengths(base - step).copysign_(magnitude) - magnitude)
        return base, step

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.setdefault("nesterov", False)  # saved by a version without nesterov
        super().__setstate__(state)

    def _magnitude_step(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Adam's step for the magnitudes, before the learning rate; (B, m) -> (B, m)."""
        beta1, beta2 = group["magnitude_betas"]
        exp_avg, exp_avg_sq, step = (state[key] for key in ("magnitude_exp_avg", "magnitude_exp_avg_sq", "step"))
        step += 1
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (exp_avg_sq / bias_correction(step, beta2).squeeze(2)).sqrt_()
        return exp_avg / bias_correction(step, beta1).squeeze(2) / spread.add_(group["eps"])


def _row_lengths(stack: Tensor) -> Tensor:
    """Lengths of the rows: (B, m, n) -> (B, m)."""
    lengths: Tensor = torch.linalg.vector_norm(stack, dim=2)
    return lengths.clamp_(min=_SHORTEST)
