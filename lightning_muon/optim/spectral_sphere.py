"""SpectralSphere and MuonSphere: Muon for weights of fixed spectral norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.linalg.newton_schulz import exact_products
from lightning_muon.linalg.scale import normalized
from lightning_muon.optim.arguments import check_choice, check_integer, check_non_negative, check_positive
from lightning_muon.optim.matrix import NonFinite
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer
from lightning_muon.optim.weight_aware import WeightAwareOptimizer, WeightReader

_FIRST_POWER_ITERATIONS = 200
"""Number of power iterations on the initial weights, for which there is no good start."""

_FIRST_STRIDE = 1e-3
"""Smallest first stride of the search for the multiplier."""


class SpectralSphere(WeightAwareOptimizer, OrthogonalizingOptimizer):
    r"""Spectral Sphere Optimizer: steepest descent on the set of weights whose largest singular value is R.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \hat M_t &= \tilde M_t / \|\tilde M_t\|_F, \qquad \tilde M_t = \mu M_t + (1 - \mu)\, G_t
        \quad\text{with nesterov, else}\quad M_t \\
        \Theta_t &= u v^\top, \qquad \sigma = \|W_{t-1}\|_2 = u^\top W_{t-1} v \quad\text{by power iteration} \\
        \Phi_t &= \operatorname{orthogonalize}(\hat M_t + \lambda_t \Theta_t), \qquad
        \lambda_t \text{ such that } \langle \Theta_t, \Phi_t \rangle = 0 \\
        W_t &= (R / \sigma)\, W_{t-1} - \eta\, R\, \Phi_t, \qquad R = c \sqrt{m / n}

    Every step first scales the weights back to the spectral norm R (retraction). With this radius the outputs of a
    layer of any shape are up to c times as large as its inputs. The multiplier :math:`\lambda` makes the step tangent
    to the sphere, so that the weights leave the sphere only by :math:`O(\eta^2)`.

    **MuonSphere** is ``lambda_search=False``: :math:`\lambda = 0`, Muon's update with retraction. Its steps leave the
    sphere by :math:`O(\eta)`.

    Source: Xie et al., arXiv 2601.08393, and the authors' code. The class of the same name in pytorch-optimizer has no
    retraction, so that its weights are not on a sphere. The search differs from that of the authors, which goes up to
    1.02 from the last multiplier, keeps that multiplier if this is not enough, and otherwise bisects. This search
    covers all :math:`|\lambda| \le 2\sqrt{\min(m, n)}`. In this range :math:`\langle \Theta, \Phi \rangle`, which does
    not decrease with :math:`\lambda`, changes sign. The search starts at the last multiplier and doubles its stride
    until the sign changes. Then it uses false position (Illinois variant) until ``tolerance`` is met, for each matrix
    of a stack separately. If no multiplier meets it, because :math:`\langle \Theta, \Phi \rangle` jumps over 0 (as for
    :math:`\hat M = \pm\Theta`), the best one tried is used. The power iteration starts from the vectors of the last
    step; at first from the largest row of the weights, plus a fixed vector. The authors make 5 iterations from a vector
    of ones at every step. Until these converge, the estimate of the norm is too low, so that the norm stays above R.
    There are no random numbers.

    Zero weights have no norm to scale and no :math:`\Theta`: their first step is that of Muon. With ``lr=0`` weights do
    not change, even if they are not on the sphere.

    State: ``momentum_buffer``, one element per weight; ``right`` v, n elements per matrix; and ``multiplier``
    :math:`\lambda`, one element per matrix.

    Cost: MuonSphere takes Muon's step, with 8 iterations in float32, and 40 products of W with a vector. The search
    orthogonalizes 3 to 6 times instead of once, more often for small square matrices, and synchronizes with the device
    after each. (The authors quote 1 % and 11 % of the time of a training step.) Prefer it if activations must keep
    their size without weight decay: in deep or wide models, for learning rates that carry over between widths, and in
    low precision. The first step scales all weights to the sphere: it is for training from scratch rather than
    fine-tuning.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`, the spectral norm of the step relative to that of the weights.
        weight_decay: weight decay before the retraction, which undoes it: it has no effect unless ``cautious``.
        momentum: :math:`\mu`, from 0 to below 1.
        nesterov: use Nesterov momentum, which looks one step ahead.
        radius: c; the authors found 2 best for language models. Choose it with care, because the first step scales all
            weights to the sphere. For example, the matrices of SASRec start at a spectral norm of 0.3 and stay near it
            in training; R = 1 changes the model.
        lambda_search: whether to search the multiplier; False for MuonSphere.
        tolerance: the search ends once :math:`|\langle \Theta, \Phi \rangle|` is not larger than this.
        power_iterations: power iterations per step for the singular vectors of the weights, starting from those of the
            last step.
        search_steps: largest number of orthogonalizations per step.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`. It limits the accuracy of
            the tangent.
        steps: number of iterations; None for the default of the method.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products; None for the default of the device. Below float32 the
            search cannot reach the default tolerance. For this reason float32 products are exact here, even if
            ``torch.set_float32_matmul_precision`` allows less.
        state_dtype: dtype of the momentum; None for the dtype of each parameter. ``right`` and ``multiplier`` are
            float32 at least.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        nesterov: bool = True,
        radius: float = 1.0,
        lambda_search: bool = True,
        tolerance: float = 2e-4,
        power_iterations: int = 20,
        search_steps: int = 30,
        method: OrthogonalizationMethod = "polar_express",
        steps: int | None = 8,
        cautious: bool = False,
        orthogonalize_dtype: torch.dtype | str | None = "float32",
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "radius": radius,
            "lambda_search": lambda_search,
            "tolerance": tolerance,
            "power_iterations": power_iterations,
            "search_steps": search_steps,
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, options, lr_scale="none", cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_positive(group, "radius")
        check_choice(group, "lambda_search", (False, True))
        check_non_negative(group, "tolerance")
        check_integer(group, "power_iterations", 1)
        check_integer(group, "search_steps", 1)

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        weights = stack.to(torch.promote_types(stack.dtype, torch.float32))
        _, right, _ = _leading_vectors(weights, _first_right(weights), _FIRST_POWER_ITERATIONS)
        return {
            **super().init_state(stack, group),
            "right": right,
            "multiplier": weights.new_zeros(stack.shape[0]),
        }

    @exact_products()
    def next_weights(
        self, read_weights: WeightReader, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        weights = read_weights()
        lr, radius = group["lr"], group["radius"] * math.sqrt(weights.shape[1] / weights.shape[2])
        left, right, sigma = _leading_vectors(weights, state["right"].to(weights.dtype), group["power_iterations"])
        dtype = weights.dtype
        del weights
        unit = normalized(self.momentum(grad, state, group), 1.0, dtype, overwrite=True)
        if group["lambda_search"]:
            tangent = self._tangent(unit, left, right, state["multiplier"], group)
        else:
            state["multiplier"].zero_()
            tangent = self.orthogonalize(unit, group)
        step = tangent.mul_(lr * radius)
        weights = read_weights()
        if group["weight_decay"] != 0 and group["cautious"]:  # the retraction undoes any other decay
            weights = self.decay_(weights, step, lr * group["weight_decay"], group)
            _, right, sigma = _leading_vectors(weights, right, group["power_iterations"])
        state["right"].copy_(right)
        moving = (sigma > 0) & (torch.as_tensor(lr, device=sigma.device) > 0)
        return weights.mul_(torch.where(moving, radius / sigma, 1.0)[:, None, None]), step

    def _tangent(self, unit: Tensor, left: Tensor, right: Tensor, multiplier: Tensor, group: dict[str, Any]) -> Tensor:
        """Phi (B, m, n). ``multiplier`` (B,) is the start of the search, and is overwritten with the result."""
        multiplier.masked_fill_(torch.linalg.vector_norm(unit, dim=(1, 2)) == 0, 0.0)  # Phi is 0 there
        every = torch.arange(unit.shape[0], device=unit.device)
        tangent, slope = self._turned(unit, left, right, every, multiplier, group)
        bracket = _Bracket(multiplier, slope, 2.0 * math.sqrt(min(unit.shape[1:])))
        error = slope.abs()
        for _ in range(group["search_steps"] - 1):
            trial = bracket.trial()
            index = (bracket.inside(trial) & (error > group["tolerance"])).nonzero().squeeze(1)
            if index.numel() == 0:
                break
            tried = trial[index]
            candidate, slope = self._turned(unit, left, right, index, tried, group)
            bracket.narrow(index, tried, slope)
            better = slope.abs() < error[index]
            multiplier[index] = torch.where(better, tried, multiplier[index])
            error[index] = torch.where(better, slope.abs(), error[index])
            tangent[index[better]] = candidate[better]
        return tangent

    def _turned(
        self, unit: Tensor, left: Tensor, right: Tensor, index: Tensor, multiplier: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """orthogonalize(unit + multiplier Theta) (b, m, n) of some matrices, and its inner product with Theta (b,)."""
        left, right = left[index], right[index]
        turned = unit[index].baddbmm_((multiplier.to(left.dtype)[:, None] * left)[:, :, None], right[:, None, :])
        turned = self.orthogonalize(turned, group)
        return turned, (left * _times(turned, right)).sum(dim=1)


class _Bracket:
    """Bracket of the root of each of B non-decreasing functions. An unknown end is infinite.

    Args:
        start: (B,) first arguments.
        value: (B,) values of the functions there.
        limit: roots are between -limit and limit.
    """

    def __init__(self, start: Tensor, value: Tensor, limit: float) -> None:
        self.limit = limit
        self.low = torch.where(value < 0, start, -math.inf)
        self.high = torch.where(value < 0, math.inf, start)
        self.low_value, self.high_value = value.clone(), value.clone()
        self.rose = value < 0  # whether the last value was negative and the low end moved
        # Estimated distance of the root: the functions increase by about sqrt(min(m, n)) per unit.
        self.stride = (value.abs() * (4 / limit)).clamp_(min=_FIRST_STRIDE)

    def trial(self) -> Tensor:
        """The next arguments (B,): false position inside a bracket, else further outward with each call."""
        outward = torch.where(self.low.isfinite(), self.low + self.stride, self.high - self.stride)
        self.stride.mul_(2)
        middle = (self.low + self.high) / 2
        weight = self.high_value / (self.high_value - self.low_value)
        crossing = self.high - weight * (self.high - self.low)
        between = torch.where((crossing > self.low) & (crossing < self.high), crossing, middle)
        known = self.low.isfinite() & self.high.isfinite()
        return torch.where(known, between, outward.clamp(-self.limit, self.limit))

    def inside(self, trial: Tensor) -> Tensor:
        """Whether each trial (B,) is inside its bracket. It is not at the limit, or if no float is between the ends."""
        return (trial > self.low) & (trial < self.high)

    def narrow(self, index: Tensor, trial: Tensor, value: Tensor) -> None:
        """Update the brackets of some functions with their values at the trials."""
        rose = value < 0
        again = rose == self.rose[index]
        # Illinois variant: halve the value at an end that stays twice. Otherwise it might stay forever.
        low_value = torch.where(again & ~rose, self.low_value[index] / 2, self.low_value[index])
        high_value = torch.where(again & rose, self.high_value[index] / 2, self.high_value[index])
        self.low[index] = torch.where(rose, trial, self.low[index])
        self.high[index] = torch.where(rose, self.high[index], trial)
        self.low_value[index] = torch.where(rose, value, low_value)
        self.high_value[index] = torch.where(rose, high_value, value)
        self.rose[index] = rose


def _first_right(weights: Tensor) -> Tensor:
    """Unit vectors (B, n) at which the power iteration of (B, m, n) starts: mainly the row of the largest norm.

    That row alone may be orthogonal to the largest singular direction, as in a block diagonal matrix. The fractional
    parts of multiples of the golden ratio are added, to which the directions of structured matrices are not orthogonal.
    """
    largest = torch.linalg.vector_norm(weights, dim=2).argmax(dim=1)
    row = weights[torch.arange(weights.shape[0], device=weights.device), largest]
    count = torch.arange(1, weights.shape[2] + 1, device=weights.device, dtype=weights.dtype)
    mixed = (count * ((math.sqrt(5) - 1) / 2)) % 1 - 0.5
    start = _unit(row) + 0.5 * _unit(mixed.expand_as(row))
    return _unit(torch.where(start.isfinite(), start, mixed))


def _leading_vectors(weights: Tensor, right: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular value sigma (B,) of (B, m, n), with left (B, m) and right (B, n) singular vectors.

    The iteration starts at ``right``. A zero or non-finite matrix keeps ``right``; the left vector of a zero matrix is
    zero. :func:`~lightning_muon.linalg.lanczos` is for norms: it adds a fixed vector to the start, keeps the
    best of all iterates, and returns only one of the two vectors.
    """
    for _ in range(iterations):
        product = _times(weights.mT, _unit(_times(weights, right)))
        found = torch.linalg.vector_norm(product, dim=1, keepdim=True) > 0
        right = torch.where(found, _unit(product), right)
    image = _times(weights, right)
    return _unit(image), right, torch.linalg.vector_norm(image, dim=1)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrix-vector products: (B, m, n) and (B, n) -> (B, m)."""
    return torch.bmm(matrices, vectors[:, :, None]).squeeze(2)


def _unit(vectors: Tensor) -> Tensor:
    """Divide each vector of (B, n) by its length; a zero vector stays zero."""
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(length == 0, 1.0, length)
