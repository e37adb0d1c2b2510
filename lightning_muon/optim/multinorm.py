"""SWAN and SinkGD: rules without state, which normalize the gradient in several ways."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon.linalg.balance import balance
from lightning_muon.linalg.scale import largest_magnitude, normalized
from lightning_muon.linalg.whitening import check_whitening, whiten
from lightning_muon.optim.arguments import check_integer, check_positive
from lightning_muon.optim.matrix import MatrixOptimizer, NonFinite


class _StatelessOptimizer(MatrixOptimizer):
    """A rule that uses only the gradient of the current step."""

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_positive(group, "rms")

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {}


class SWAN(_StatelessOptimizer):
    r"""SWAN: SGD with a gradient that is standardized by row and then whitened. It has no state.

    .. math::
        \tilde G_{ij} &= (G_{ij} - \mu_i) / \sigma_i, \qquad \mu_i, \sigma_i \text{ mean and standard deviation of row }
        i \\
        O &= \operatorname{whiten}(\tilde G) \approx (\tilde G \tilde G^\top)^{-1/2}\, \tilde G \\
        D &= \rho\, O\, \|\tilde G\|_F / \|O\|_F \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, D

    Whitening runs on the smaller side (:func:`~lightning_muon.linalg.whiten`), in float32 or float64. With exact
    whitening :math:`O` would be the polar factor: Muon without momentum, of the standardized gradient. The root mean
    square of D is :math:`\rho`. It is less if rows are constant (zeros, or a single column), because such a
    row becomes zero.

    Source: arXiv 2412.13148. The authors have published no code; the constants are those of re-implementations. With
    their ``beta`` of 0.8 and 10 steps the iteration does not converge: small singular values grow fast, but then all of
    them stay between 0.56 and 1.6, for any number of steps. With 0.5 it converges to 1, but more slowly (30 steps for
    1e-4). The paper's equation for standardization divides by a sum; the standard deviation must be meant. In the paper
    the update has a root mean square of 1, which is ``rms=1``, and there is no weight decay.

    Prefer it to Muon if there is no memory for a momentum and batches are large. Parameters that are not matrices still
    need the state of their optimizer, e.g. AdamW.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        rms: :math:`\rho`, root mean square of the update's elements, above 0; with 0.2 AdamW's learning rates carry
            over.
        beta: step of the whitening iteration, above 0 and at most 0.866.
        steps: number of whitening iterations.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        state_dtype: dtype in which gradients are read; None for the dtype of each parameter. There is no state.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: none.

    Cost: ten iterations of two matrix products in float32. Muon has five iterations of three products, in bfloat16 if
    that is faster.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        rms: float = 0.2,
        beta: float = 0.8,
        steps: int = 10,
        cautious: bool = False,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "rms": rms, "beta": beta, "steps": steps}
        super().__init__(
            params, defaults, lr_scale="none", cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_whitening(group["beta"], group["steps"])

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        standard = _standardized_rows(grad.to(torch.promote_types(grad.dtype, torch.float32)))
        norm = torch.linalg.vector_norm(standard, dim=(-2, -1), keepdim=True).mul_(group["rms"])
        white = whiten(standard, group["beta"], group["steps"], overwrite=True)
        # Set the mean of each row to 0 again: in tall matrices, whitening enlarges the rounding error in this direction
        # to the size of the other directions.
        white.sub_(white.mean(dim=-1, keepdim=True))
        return normalized(white, 1.0, white.dtype, overwrite=True).mul_(norm)


class SinkGD(_StatelessOptimizer):
    r"""SinkGD: SGD with a gradient whose rows and columns get equal norms by Sinkhorn sweeps. It has no state.

    Starting from :math:`X = G`, each sweep is

    .. math::
        X_{i,:} &\leftarrow \sqrt n\, X_{i,:} / \|X_{i,:}\|_2 \quad\text{for each row,} \qquad
        X_{:,j} \leftarrow \sqrt m\, X_{:,j} / \|X_{:,j}\|_2 \quad\text{for each column} \\
        D &= \rho\, X \\
        W_t &= (1 - \eta\lambda)\, W_{t-1} - \eta\, D

    At the end the columns of :math:`X` have norm :math:`\sqrt m` exactly and its rows nearly :math:`\sqrt n`, so that
    the root mean square of D is :math:`\rho`. Zero rows and columns stay zero and do not count. The scale of the
    gradient does not matter, and that of single rows and columns hardly does.

    Source: arXiv 2502.06742. The published step :math:`\eta \cdot 0.05\, X` equals this one at ``rms=0.2`` with a
    quarter of that learning rate; the factor 0.05 is that of re-implementations. The paper has no weight decay.

    Prefer it to Muon where memory allows no momentum, matrices are large and so are batches. Adam's state remains for
    what is no matrix.

    Args:
        params: parameters or param groups; see :class:`MatrixOptimizer`.
        lr: learning rate :math:`\eta`.
        weight_decay: decoupled weight decay :math:`\lambda`.
        rms: :math:`\rho`, root mean square of the update's elements, above 0; with 0.2 AdamW's learning rates carry
            over.
        sweeps: number of sweeps over rows and columns.
        cautious: decay only where the update also shrinks the weight (arXiv 2510.12402).
        state_dtype: dtype in which gradients are read; None for the dtype of each parameter. There is no state.
        nonfinite: what to do about NaN or infinity in a gradient; see :class:`MatrixOptimizer`.

    State: none.

    Cost: no matrix product, but about eight passes over the gradient per sweep: far less than Muon's for large
    matrices, not much less for small ones.

    Raises:
        ValueError: if an argument is out of range, or a parameter cannot be read as matrices.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        rms: float = 0.2,
        sweeps: int = 5,
        cautious: bool = False,
        state_dtype: torch.dtype | str | None = "float32",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "rms": rms, "sweeps": sweeps}
        super().__init__(
            params, defaults, lr_scale="none", cautious=cautious, state_dtype=state_dtype, nonfinite=nonfinite
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_integer(group, "sweeps", 1)

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        balanced = balance(wide, sweeps=group["sweeps"], overwrite=True)  # columns of norm 1
        return balanced.mul_(group["rms"] * math.sqrt(balanced.shape[-2]))


def _standardized_rows(grad: Tensor) -> Tensor:
    """Scale rows in place to mean 0 and root mean square 1; constant rows become zero."""
    # Division by the largest element keeps squares in range, and makes a constant row exactly constant: 1 or -1.
    largest = largest_magnitude(grad, -1)
    grad.div_(torch.where(largest == 0, 1.0, largest))
    grad.sub_(grad.mean(dim=-1, keepdim=True))
    deviation = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).div_(math.sqrt(grad.shape[-1]))
    return grad.div_(torch.where(deviation == 0, 1.0, deviation))
