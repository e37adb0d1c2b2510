"""SpecMuon: Muon on the leading singular directions, weighted by the loss (experimental)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg.scale import normalized
from lightning_muon.optim import MomentumOptimizer
from lightning_muon.optim.arguments import check_fraction, check_integer, check_positive
from lightning_muon.optim.matrix import NonFinite


class SpecMuon(MomentumOptimizer):
    r"""SpecMuon: Muon on the k leading singular directions, each weighted by a scalar over the root of the loss.

    **Experimental**: the authors have published no code, and the equations below are from a third party's transcription
    of the paper. Its text and equation contradict each other about the directions beyond the first k: the text calls
    this part orthogonalized, the equation keeps the singular values. This class follows the equation. With L the loss
    of this step,

    .. math::
        \hat G_t &= G_t / (\|G_t\|_F + \epsilon) = \sum_j s_j u_j v_j^\top, \qquad s_1 \ge s_2 \ge \dots \\
        r'_j &= r_j \Big/ \left(1 + \frac{\eta}{2 (s_j + \epsilon)}\, \frac{s_j}{\sqrt L + \epsilon}\right),
        \qquad j \le k, \quad r_j = \sqrt{L} \text{ before the first step} \\
        T_j &= (1 - \xi)\, r_j'^2 + \xi\, r_j^2 + (1 - \xi)\, (r'_j - r_j)^2 \\
        \chi_j &= \operatorname{clip}\big((\sqrt L - \sqrt{T_j}) / (\sqrt L - r'_j + \epsilon),\, 0,\, 1\big), \qquad
        r_j \leftarrow \chi_j r'_j + (1 - \chi_j) \sqrt L \\
        O_t &= \sum_{j \le k} \frac{r'_j}{\sqrt L + \epsilon}\, u_j v_j^\top + \sum_{j > k} s_j u_j v_j^\top \\
        B_t &= \mu B_{t-1} + O_t, \qquad W_t = (1 - \eta\lambda)\, W_{t-1} - \eta\, B_t.

    As :math:`\eta \to 0` with a constant loss, :math:`r' = \sqrt L` and the leading part is that of Muon. The momentum
    is a sum, as published, so that with constant gradients steps are :math:`1 / (1 - \mu)` times as long as those of
    ``Muon`` with ``lr_scale="none"``. There is no shape scale. Directions whose singular value is rounding error are
    left out.

    **r does not follow the loss.** In these equations it starts at :math:`\sqrt L` of the first step and never
    increases. It decreases by a factor of :math:`1 / (1 + \eta / (2 \sqrt L))` per step at most. So as the loss
    decreases, steps grow with :math:`1 / \sqrt L`: at ``lr=1e-3``, a loss of 1, 1e-4 and 1e-8 in successive steps gives
    leading parts of 1, 95 and 1588 times Muon's. When a small network was fitted to a sine, the largest was 4 times
    Muon's at ``lr=1e-2``, 20 times at 1e-3 and 80 to 100 times at 1e-4. With a constant loss the leading part vanishes:
    with a loss of 1 and ``lr=1e-3``, 0.61 of Muon's is left after 2000 steps and 0.08 after 10000.

    Source: Lu, Zhang & Lin, arXiv 2602.16167. The hyper-parameters and the part beyond the first k could not be
    verified.

    The loss is the return value of the closure of ``step(closure)``; it must not be negative. Lightning's automatic
    optimization passes a closure, except with ``precision="16-mixed"``. With gradient accumulation the loss is that of
    the last micro-batch, divided by ``accumulate_grad_batches``. With several processes, as in DDP, a step raises an
    error: each process has a loss of its own, so that their weights would diverge.

    State: ``momentum_buffer``, one element per weight; ``energies`` :math:`r`, min(k, m, n) elements per matrix;
    ``step``, one per matrix.

    Cost: a singular value decomposition of every gradient, which takes many times as long as Muon's step, above all on
    a GPU. A step also synchronizes with the device once, for the loss. Prefer Muon: this rule is for experiments with
    the method of the paper. Its steps grow if the loss goes to zero, as in the physics-informed networks of the paper.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1.
        modes: k, at least 1.
        relaxation: :math:`\xi`, from 0 to below 1.
        eps: :math:`\epsilon`, above 0.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        state_dtype: dtype of the momentum; None for the dtype of each parameter. All other state is float32 at least.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    Raises:
        ValueError: if an argument is out of range, if a parameter cannot be read as matrices, or, in a step, if the
            loss is negative or not finite.
        RuntimeError: in a step without a loss or with more than one process.
    """

    _loss: Any = None
    """Return value of the closure of the current step; None without a closure, and between steps."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        modes: int = 8,
        relaxation: float = 0.5,
        eps: float = 1e-8,
        cautious: bool = False,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "modes": modes,
            "relaxation": relaxation,
            "eps": eps,
        }
        super().__init__(
            params, options, lr_scale="none", cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_integer(group, "modes", 1)
        check_fraction(group, "relaxation")
        check_positive(group, "eps")

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        dtype = torch.promote_types(stack.dtype, torch.float32)
        modes = min(group["modes"], stack.shape[1], stack.shape[2])
        return {
            **super().init_state(stack, group),
            "energies": stack.new_zeros(stack.shape[0], modes, dtype=dtype),
            "step": stack.new_zeros(stack.shape[0], dtype=dtype),
        }

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step with the loss that the closure returns.

        Raises:
            RuntimeError: if there is no closure, or more than one process.
            ValueError: if the loss is negative or not finite.
        """
        if closure is None:
            return super().step()

        def remembered() -> float:
            self._loss = closure()
            return cast(float, self._loss)

        try:
            return super().step(remembered)
        finally:
            self._loss = None

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        root = math.sqrt(self._checked_loss())
        finite = grad.isfinite().flatten(1).all(dim=1)
        left, values, right = _decomposed(grad.masked_fill_(~finite[:, None, None], 0.0), group["eps"])
        energies, step = state["energies"], state["step"]
        energies.copy_(torch.where(step[:, None] == 0, root, energies))
        modes = energies.shape[1]
        damped = _damped(energies, values[:, :modes], root, group["lr"], group["eps"])
        weights = torch.cat([damped / (root + group["eps"]), values[:, modes:]], dim=1)
        energies.copy_(_relaxed(energies, damped, root, group["relaxation"], group["eps"]))
        step.add_(1)
        known = left * weights[:, None, :] @ right
        buffer = state["momentum_buffer"].mul_(group["momentum"])
        buffer.add_(torch.where(finite[:, None, None], known, torch.nan))
        return grad.copy_(buffer)

    def _checked_loss(self) -> float:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"SpecMuon runs in one process, not in {dist.get_world_size()} processes: each would step by the loss "
                "of its own batch, and their weights would drift apart. Train on one device, or use another rule, such "
                "as Muon."
            )
        if self._loss is None:
            raise RuntimeError(
                "SpecMuon needs the loss at every step: call step(closure) with a closure that returns it. Lightning's "
                "automatic optimization does, except with precision='16-mixed'."
            )
        self._loss = loss = float(self._loss)  # keep the float: each read synchronizes with the device
        if not 0.0 <= loss < math.inf:
            raise ValueError(
                f"SpecMuon needs a finite loss of 0 or more, got {loss}: it takes the root. Add a constant to a loss "
                "that is bounded below, or use another optimizer."
            )
        return loss


def _decomposed(grad: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of G / (||G||_F + eps): (B, m, k), (B, k), (B, k, n) with k = min(m, n).

    ``grad`` is overwritten. Left vectors are zero where the singular value is rounding error: their direction is
    arbitrary.
    """
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=(1, 2))[:, None]
    left, values, right = torch.linalg.svd(normalized(wide, 1.0, wide.dtype, overwrite=True), full_matrices=False)
    kept = values > values[:, :1] * max(grad.shape[1:]) * torch.finfo(values.dtype).eps
    return left * kept[:, None, :], values * torch.where(norm.isinf(), 1.0, norm / (norm + eps)), right


def _damped(energies: Tensor, values: Tensor, root: float, lr: float | Tensor, eps: float) -> Tensor:
    """The damped energies r' (B, k)."""
    lr = lr.to(values) if isinstance(lr, Tensor) else lr
    return energies / (1 + 0.5 * lr / (values + eps) * (values / (root + eps)))


def _relaxed(energies: Tensor, damped: Tensor, root: float, relaxation: float, eps: float) -> Tensor:
    """The next r (B, k)."""
    target = (1 - relaxation) * (damped.square() + (damped - energies).square()) + relaxation * energies.square()
    gap = root - damped + eps
    share = torch.where(gap == 0, 1.0, (root - target.sqrt()) / gap).clamp(0.0, 1.0)
    return share * damped + (1 - share) * root
