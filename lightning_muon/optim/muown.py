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
"""Length that a row is taken to have at least, so that rows of zeros have a direction to grow in."""


class Muown(WeightAwareOptimizer, OrthogonalizingOptimizer):
    r"""Muown: weights as magnitude times direction, row by row, with Adam for the magnitudes and Muon for the rest.

    Row :math:`i` of the weights is :math:`W_i = g_i u_i` with :math:`u_i = v_i / \|v_i\|`, a magnitude for each output
    unit and a direction. The gradient by each follows from that by W,

    .. math::
        \gamma_i &= \langle G_i, u_i \rangle, \qquad
        \Gamma_i = \frac{g_i}{\|v_i\|} (G_i - \gamma_i u_i) \\
        M_t &= \mu M_{t-1} + (1 - \mu)\, \Gamma \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, \Gamma \quad\text{with nesterov, else}\quad M_t \\
        v_t &= v_{t-1} - \eta\, s(m, n) \operatorname{orthogonalize}(\tilde M_t) \\
        g_t &= g_{t-1} - \eta\, \hat p_t / (\sqrt{\hat q_t} + \epsilon) \\
        W_{t,i} &= g_{t,i}\, v_{t,i} / \|v_{t,i}\| - \eta\lambda\, W_{t-1,i}

    where :math:`\hat p` and :math:`\hat q` are the bias-corrected averages of :math:`\gamma` and :math:`\gamma^2`, as
    in Adam. At the start :math:`v = W` and :math:`g_i = \|W_i\|`. After a step with weight decay :math:`g_i` is the
    length of row i again, with its sign, and the direction is that of the decayed row. As :math:`\Gamma_i` is
    orthogonal to :math:`v_i`, the directions :math:`v` tend to grow longer, which makes the later turns smaller, as
    under weight normalization.

    Of v only the length is kept; the rest is read off the weights. So weights changed from outside, by loading or
    averaging, count as they are: a row that differs from its magnitude in length by more than rounding (1 part in 128
    in bfloat16, 1e-7 in float32) gives it a new one of the same sign. The averages stay, as in every optimizer. In
    float16 a row of zeros cannot leave zero, because its first steps are too small for that format; in bfloat16 and
    float32 it can.

    Source: Lion et al., arXiv 2605.10797, and the authors' code (github.com/kcc-lion/muown), whose defaults these are
    but for the learning rate (there 3e-4), weight decay of 0 among them: the method is meant to hold the norms without
    it. Three things differ. A magnitude that has crossed zero keeps its sign when it is read again after a decay; there
    it becomes positive, against the averages. A weight three times as tall as wide is one matrix here unless its layout
    splits it; there it always counts as a fused query, key and value. The authors' distributed class, which also
    shrinks the magnitudes first, decays more than their other one, which is followed here. NVIDIA's
    Emerging-Optimizers has neither the look-ahead nor a decay of anything but the magnitudes.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta` of both parts.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1, for the directions.
        nesterov: look one step ahead, in the directions.
        magnitude_betas: decay of the averages :math:`p` and :math:`q`, from 0 to below 1.
        eps: :math:`\epsilon`, above 0.
        method: how to orthogonalize; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the method's own.
        lr_scale: shape scale :math:`s(m, n)` of the directions; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None to choose by device.
        state_dtype: dtype of the momentum; None for each parameter's own. What there is one of a row is float32 at
            least, so that parameters of less precision still gather small changes of length.
        nonfinite: what NaN or infinity in a gradient does; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight; ``magnitude``, ``direction_norm``, ``magnitude_exp_avg`` and
    ``magnitude_exp_avg_sq``, one a row; ``step``, one a matrix. Muon's memory and next to nothing.

    Cost: Muon's, and some six passes over weights and gradient.

    Prefer it to Muon where the spectral norm of the weights creeps up in long runs, or where runs depend much on
    weight decay and learning rate: the length of rows, which drives that growth, has its own variable and adaptive
    step.

    Raises:
        ValueError: for an argument out of range, and for a parameter that cannot be read as matrices.

    Example::

        optimizer = Muown(block.linear.parameters(), lr=1e-3)
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
        # Rounding to the parameter's dtype changes the length of a row by less than eps. More came from outside.
        changed = (lengths - magnitude).abs() > torch.finfo(read_weights.dtype).eps * magnitude.abs()
        magnitude.copy_(torch.where(changed, lengths, magnitude))

        gradient = grad.to(weights.dtype)
        along = (gradient * weights).sum(dim=2) / lengths
        gradient.addcmul_(weights, (along / lengths).unsqueeze(2), value=-1).mul_((magnitude / norm).unsqueeze(2))
        del weights
        turn = self.orthogonalize(self.momentum(gradient.to(grad.dtype), state, group), group)
        del grad, gradient  # as much memory as the weights, which are read again
        weights = read_weights()
        turn = turn.to(weights.dtype)
        rate = lr * shape_scale(group["lr_scale"], *weights.shape[1:])
        directions = turn.mul_(-rate).addcmul_(weights, (norm / lengths).unsqueeze(2))
        norm.copy_(_row_lengths(directions))

        # Rounded parameters have rows a little longer or shorter than their magnitudes, which the base makes up for. A
        # learning rate of 0 leaves every bit.
        moves = lr != 0
        base = weights.mul_((1 + moves * (magnitude / lengths - 1)).unsqueeze(2))
        magnitude -= lr * self._magnitude_step(along, state, group)
        step = directions.mul_((-magnitude / norm).unsqueeze(2)).add_(base).mul_(moves)
        amount = lr * group["weight_decay"]
        if not (isinstance(amount, (int, float)) and amount == 0.0):
            self.decay_(base, step, amount, group)
            # From the weights before they are rounded, so that small decays add up in every dtype.
            magnitude += moves * (_row_lengths(base - step).copysign_(magnitude) - magnitude)
        return base, step

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.setdefault("nesterov", False)  # saved when the rule did not look ahead
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
    """(B, m, n) -> (B, m)."""
    lengths: Tensor = torch.linalg.vector_norm(stack, dim=2)
    return lengths.clamp_(min=_SHORTEST)
