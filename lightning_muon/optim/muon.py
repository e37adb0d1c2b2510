"""Muon: momentum, orthogonalized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg import OrthogonalizationMethod
from lightning_muon.optim.matrix import LRScale, NonFinite
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer


class Muon(OrthogonalizingOptimizer):
    r"""Muon: the update is the orthogonalized momentum, so that all its singular values are equal.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        O_t &= \operatorname{orthogonalize}(\tilde M_t) \approx U V^\top \quad\text{of}\quad \tilde M_t = U \Sigma
        V^\top \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, s(m, n)\, O_t

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; weight decay and the default scale from Moonlight,
    arXiv 2502.16982. With ``lr_scale="original"`` or ``"match_rms_adamw"`` it equals ``torch.optim.Muon`` with the same
    ``adjust_lr_fn``, but works on stacks of matrices, and also takes convolutions, fused projections and experts.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1.
        nesterov: use Nesterov momentum, which looks one step ahead.
        method: orthogonalization method; see :func:`~lightning_muon.linalg.orthogonalize`.
        steps: number of iterations; None for the default of the method.
        lr_scale: shape scale :math:`s(m, n)`; see :class:`MatrixOptimizer`. With ``"match_rms_adamw"`` the root mean
            square of the update is 0.2, as is usual with AdamW.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        orthogonalize_dtype: dtype of the matrix products, e.g. ``"bfloat16"``; None for the default of the device.
        state_dtype: dtype of the momentum; None for the dtype of each parameter.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight.

    Cost: five iterations of three matrix products each, 20 m^2 n + 10 m^3 operations for m <= n. The forward and
    backward pass of a Linear layer takes 6 m n operations per token, so that with thousands of tokens per batch the
    cost is small.

    Prefer it to its variants because it is the best known; :class:`~lightning_muon.optim.NorMuon` costs hardly more.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> optimizer = Muon([model[2].weight], lr=1e-3)
        >>> optimizer = HybridOptimizer.from_module(model, matrix=partial(Muon, lr=1e-3))
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
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
            "method": method,
            "steps": steps,
            "orthogonalize_dtype": orthogonalize_dtype,
        }
        super().__init__(
            params, defaults, lr_scale=lr_scale, cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return self.orthogonalize(self.momentum(grad, state, group), group)
