"""REG: scales the rows and columns of the momentum instead of orthogonalizing it. A reconstruction."""

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
    r"""REG, reconstructed: divides rows and columns of the momentum by their norms, with updates of AdamW's size.

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
        \tilde M_t &= \mu M_t + (1 - \mu)\, G_t \quad\text{with nesterov, else}\quad M_t \\
        X_{ij} &= \tilde M_{t,ij} / r_i^a, \quad r_i = \|\tilde M_{t,i,:}\|_p; \qquad
        X_{ij} \leftarrow X_{ij} / c_j^a, \quad c_j = \|X_{:,j}\|_p \qquad\text{(once a sweep)} \\
        D_t &= \rho\, X / \operatorname{RMS}(X) \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, D_t

    and with ``order="simultaneous"`` :math:`X_{ij} = \tilde M_{t,ij} / (r_i c_j)^a`, both norms of :math:`\tilde M_t`;
    see :func:`~lightning_muon.linalg.balance`.

    This is a reconstruction of arXiv 2510.03691. The available text does not say what the exponent, the order of rows
    and columns, the number of sweeps, the momentum, its Nesterov variant and the target root mean square are, and the
    authors have published no code. The text does say: momentum as in Muon; row and column scaling in place of the
    matrix sign, with p = 2 the best of the norms tried; a normalized root mean square; decoupled weight decay; AdamW
    for embeddings. The rest are arguments here, with our own defaults. For all values of these arguments the root mean
    square of the update is exact, signs are those of the momentum, and the scale of gradients does not matter.

    Prefer it to Muon if a step must be cheap (it multiplies no matrices), or if Muon changes the direction too much.
    The paper says so about fine-tuning of models that were trained with AdamW.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`; AdamW's carries over.
        weight_decay: decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`, from 0 to below 1.
        nesterov: use Nesterov momentum, which looks one step ahead.
        p: order of the row and column norms, from 1 to infinity.
        exponent: :math:`a`, above 0. With 1, ``"sequential"`` and ``p=2`` all columns of an update have the same norm.
        order: ``"sequential"`` (rows, then columns of the result) or ``"simultaneous"``, which treats both alike; with
            ``exponent=0.5`` it changes the momentum least.
        sweeps: number of sweeps; many sweeps make the norms of all rows and columns equal.
        rms: :math:`\rho`, root mean square of the update's elements, above 0.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        state_dtype: dtype of the momentum; None for the dtype of each parameter.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: ``momentum_buffer``, one element per weight.

    Cost: less than Muon's: about ten passes over the momentum and no matrix product.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
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
