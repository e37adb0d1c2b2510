"""REG: momentum with its rows and columns scaled, instead of orthogonalized. A reconstruction."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg.balance import BalanceOrder, balance, check_balance
from lightning_muon.linalg.scale import normalized
from lightning_muon.optim.arguments import check_positive
from lightning_muon.optim.matrix import NonFinite
from lightning_muon.optim.momentum import MomentumOptimizer


class REG(MomentumOptimizer):
    r"""REG, reconstructed: rows and columns of the momentum divided by their norms, at AdamW's update size.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        X_{ij} &= \tilde M_{t,ij} / r_i^a, \quad r_i = \|\tilde M_{t,i,:}\|_p; \qquad
        X_{ij} \leftarrow X_{ij} / c_j^a, \quad c_j = \|X_{:,j}\|_p \qquad\text{(once a sweep)} \\
        D_t &= \rho\, X / \operatorname{RMS}(X) \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, D_t

    and with ``order="simultaneous"`` :math:`X_{ij} = \tilde M_{t,ij} / (r_i c_j)^a`, both norms of :math:`\tilde M_t`;
    see :func:`~lightning_muon.linalg.balance`.

    This is a reconstruction of arXiv 2510.03691. The published text that is available does not fix the exponent, the
    order of rows and columns, the number of sweeps, the momentum and whether it looks ahead, or the target of the root
    mean square, and there is no code by the authors. Established are: momentum as in Muon, row-and-column scaling in
    place of the matrix sign, with p = 2 the best of the norms tried, a normalised root mean square, decoupled weight
    decay, AdamW for embeddings. The rest are arguments here, and their defaults are ours: whatever they are, the root
    mean square of the update is exact, signs are those of the momentum, and the scale of gradients does not matter.

    Prefer it to Muon where a step must be cheap (it multiplies no matrices) or Muon's change of direction is too much,
    as the paper has it for fine-tuning models that AdamW has trained.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`; AdamW's carries over.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1.
        nesterov: look one step ahead.
        p: order of the row and column norms, from 1 to infinity.
        exponent: :math:`a`, above 0. With 1, ``"sequential"`` and ``p=2`` all columns of an update have one norm.
        order: ``"sequential"`` (rows, then columns of the result) or ``"simultaneous"``, which treats both alike; with
            ``exponent=0.5`` it is the mildest choice.
        sweeps: how often; many make the norms of rows and columns equal.
        rms: :math:`\rho`, root mean square of the update's entries, above 0.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        state_dtype: dtype of the momentum; None for each parameter's own.
        nonfinite: what NaN or infinity in a gradient does; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight.

    Cost: less than Muon's: some ten passes over the momentum and no matrix product.

    Raises:
        ValueError: for an argument out of range, and for a parameter that cannot be read as matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        p: float = 2.0,
        exponent: float = 1.0,
        order: BalanceOrder = "sequential",
        sweeps: int = 1,
        rms: float = 0.2,
        cautious: bool = False,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "p": p,
            "exponent": exponent,
            "order": order,
            "sweeps": sweeps,
            "rms": rms,
        }
        _warn_of_reconstruction()
        super().__init__(
            params, defaults, lr_scale="none", cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_balance(group["p"], group["exponent"], group["order"], group["sweeps"])
        check_positive(group, "rms")

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        momentum = self.momentum(grad, state, group)
        momentum = momentum.to(torch.promote_types(momentum.dtype, torch.float32))
        scaled = balance(momentum, group["p"], group["exponent"], group["order"], group["sweeps"], overwrite=True)
        norm = group["rms"] * math.sqrt(scaled.shape[-2] * scaled.shape[-1])
        return normalized(scaled, 1.0, scaled.dtype, overwrite=True).mul_(norm)


@cache
def _warn_of_reconstruction() -> None:
    warnings.warn(
        "REG is a reconstruction of arXiv 2510.03691: its authors published no code, and their text leaves exponent, "
        "order, sweeps, momentum and the size of the update open. These are arguments, and their defaults are ours.",
        stacklevel=3,
    )
