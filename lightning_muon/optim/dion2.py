"""Dion2: Muon on the rows or columns with the largest momentum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.optim.arguments import check_positive
from lightning_muon.optim.matrix import LRScale, NonFinite
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer


class Dion2(OrthogonalizingOptimizer):
    r"""Dion2: each step orthogonalizes only the largest slices of the momentum.

    Slices are along the shorter dimension: rows :math:`i` if m <= n, else columns. A step uses :math:`k = \lceil f
    \min(m, n) \rceil` of them:

    .. math::
        M &\leftarrow M_{t-1} + G_t \\
        K &= \text{the } k \text{ slices with the largest } \|M_i\|_1 \\
        D_K &= \operatorname{orthogonalize}(M_K), \quad D_i = 0 \text{ for } i \notin K \\
        M_{t,i} &= \mu M_i \text{ for } i \in K, \quad M_i \text{ for } i \notin K \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, s(m, n)\, D

    Only the slices that a step has used decay (error feedback); the others accumulate gradients until they are
    selected. All weights decay at every step. The shape scale is that of the whole matrix: elements that change do so
    by as much as with Muon, and the norm of the update is :math:`\sqrt f` times that of Muon.

    Source: Ahn, Amsel, Langford, arXiv 2512.16928. As in the authors' code, slices are selected by size; the paper also
    has a random selection. The authors' defaults are ``lr=0.01``, ``weight_decay=0.01``, ``lr_scale="spectral"`` and
    Polar Express.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, factor of the slices that a step has used, from 0 to below 1.
        fraction: :math:`f`, the fraction of the slices that a step uses, above 0 and at most 1. With 1 it is Muon
            without Nesterov momentum.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`.
        cautious: decay only where the update also shrinks the weight, or is zero (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the momentum; None for the dtype of each parameter.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight, as Muon.

    Cost: less than Muon. A step takes :math:`f^2` of the operations of Muon's products (:math:`f^3` on the short side),
    a sixteenth with the default, and two more passes over the momentum. For stacks of small matrices, where the
    overhead of each call takes most of the time, it is not faster.

    Prefer it if Muon takes a noticeable part of the time: large matrices with few tokens per batch. In the paper the
    loss is close to Muon's with a quarter of the slices.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> optimizer = Dion2([model[0].weight], lr=1e-3, fraction=0.25)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        fraction: float = 0.25,
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
            "fraction": fraction,
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, defaults, lr_scale=lr_scale, cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_positive(group, "fraction")
        if group["fraction"] > 1:
            raise ValueError(f"fraction must be above 0 and at most 1, the whole matrix, got {group['fraction']!r}.")

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        momentum = state["momentum_buffer"].add_(grad)
        dim, index = _largest_slices(momentum, group["fraction"])
        selected = momentum.gather(dim, index)
        momentum.scatter_(dim, index, selected * group["momentum"])
        return grad.zero_().scatter_(dim, index, self.orthogonalize(selected, group))


def _largest_slices(matrices: Tensor, fraction: float) -> tuple[int, Tensor]:
    """The dimension along which matrices (B, m, n) are sliced, and the index of the largest slices of each.

    The index is for ``gather`` and ``scatter``: (B, k, n) for rows, (B, m, k) for columns. It is in ascending order, so
    that with all slices ``gather`` returns the matrix itself.
    """
    _, m, n = matrices.shape
    dim, other = (1, 2) if m <= n else (2, 1)
    count = max(1, math.ceil(fraction * matrices.shape[dim]))
    wide = torch.promote_types(matrices.dtype, torch.float32)
    sizes = torch.linalg.vector_norm(matrices, ord=1, dim=other, dtype=wide)
    chosen = sizes.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    return dim, chosen.unsqueeze(other).expand(-1, *((count, n) if dim == 1 else (m, count)))
