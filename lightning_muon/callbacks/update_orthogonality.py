"""UpdateOrthogonalityMonitor: how far the updates are from orthogonal matrices."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_muon.callbacks.spectral_monitor import SpectralMonitor
from lightning_muon.diagnostics.probe import Depth
from lightning_muon.diagnostics.quantity import Quantity
from lightning_muon.linalg import Spectra


class UpdateOrthogonalityMonitor(SpectralMonitor):
    r"""Logs how far each update :math:`U` (m, n) is from a multiple of an orthogonal matrix.

    With :math:`r = \min(m, n)` singular values :math:`\sigma_i` and :math:`q^2 = \|U\|_F^2 / r`,

    .. math::
        \text{update\_orthogonality\_error} = \tfrac{1}{\sqrt r} \left\| U U^\top / q^2 - I \right\|_F
        = \sqrt{\tfrac{1}{r} \sum_i (\sigma_i^2 / q^2 - 1)^2} \in [0, \sqrt{r - 1}]

    on the smaller side. It does not depend on learning rate or shape scale. 0 means orthogonal, :math:`\sqrt{r - 1}`
    rank one. On SASRec five Newton-Schulz steps of Muon left 0.3 to 0.5, and AdamW 1.5 to 7. A rising error of Muon
    means that the momentum has low rank: the iteration no longer lifts its smallest singular values.

    ``update_condition_number`` is :math:`\sigma_1` over a quantile of the singular values, in :math:`[1, \infty]`,
    computed with the exact spectra. 1 means orthogonal; on SASRec Muon's was 1.6 to 2.3 and AdamW's 15 to 700.

    An update is what the step subtracts from the weights, without weight decay. Optimizers of this package show it; for
    any other optimizer it is the difference of the weights. Weight decay stays in if it is part of the gradient (SGD,
    Adam), or if its form is not known, with a warning. Another warning says that differences of weights in half
    precision are mostly rounding. Updates of zero are left out. If an optimizer moves the weights while it evaluates
    the closure (SAM), the update is measured from the moved weights.

    Keys: ``update_orthogonality_error/mean``, ``/max``, ``/<matrix>``; ``update_condition_number/...``.

    Args:
        every_n_steps: how often to measure; None for the Trainer's ``log_every_n_steps``.
        quantile: quantile of the singular values that divides the largest: 0 for the smallest; 0.1 for the one with a
            tenth below it, which a few dead directions do not change.
        **kwargs: as in :class:`~lightning_muon.callbacks.spectral_monitor.SpectralMonitor`.

    Raises:
        MisconfigurationException: for values out of range, and globs that match nothing.

    Example::

        >>> trainer = Trainer(callbacks=[UpdateOrthogonalityMonitor(every_n_steps=50)])
    """

    name = "update_orthogonality"

    def __init__(self, every_n_steps: int | None = None, quantile: float = 0.1, **kwargs: Any) -> None:
        super().__init__(every_n_steps, **kwargs)
        if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0.0 <= quantile < 1.0:
            raise MisconfigurationException(f"quantile must be a number in [0, 1), got {quantile!r}.")
        self.quantile = quantile
        self.quantities = [
            Quantity(
                "update_orthogonality_error",
                "update",
                Depth.GRAM,
                _orthogonality_error,
                "max",
                "doubled",
                "orthogonality error",
            ),
            Quantity(
                "update_condition_number",
                "update",
                Depth.SPECTRUM,
                partial(_condition_number, quantile=quantile),
                "max",
                None,
                f"largest singular value / {quantile:g}-quantile",
            ),
        ]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "quantile": self.quantile}


def _orthogonality_error(spectra: Spectra, shape: tuple[int, int]) -> Tensor:
    assert spectra.orthogonality_error is not None
    return spectra.orthogonality_error


def _condition_number(spectra: Spectra, shape: tuple[int, int], quantile: float) -> Tensor:
    return spectra.condition_number(quantile)
