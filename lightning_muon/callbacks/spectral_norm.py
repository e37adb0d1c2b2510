"""SpectralNormMonitor: the spectral norms of the weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_muon.callbacks.spectral_monitor import SpectralMonitor
from lightning_muon.diagnostics.probe import Depth
from lightning_muon.diagnostics.quantity import Quantity
from lightning_muon.linalg import Spectra
from lightning_muon.partition import ParameterRule


class SpectralNormMonitor(SpectralMonitor):
    r"""Logs the spectral norm :math:`\sigma_1` of each weight matrix, its largest singular value.

    .. math:: \|W\|_2 = \max_{\|x\|_2 = 1} \|W x\|_2 \ge 0

    It bounds how much a layer can enlarge its input, and how much the logits of attention can grow. Healthy norms grow
    for a while and level off. A norm that keeps doubling precedes divergence; the table warns of one that doubled since
    the table before. Power iteration from the last measurement gives the norm within 1 % from below. The norm is exact
    if another monitor decomposes the matrix in the same step. Under a parametrization (spectral or weight norm) the
    stored parameter is measured.

    ``rms=True`` also logs ``rms_operator_norm``, :math:`\sigma_1 \sqrt{n / m} \ge 0` for m rows (fan-out) and n
    columns (fan-in): the same bound for the root mean square of inputs and outputs, which compares layers of all
    shapes. Near 1 a layer keeps the scale of its input; on SASRec it was 0.2 to 1.5.

    Keys: ``spectral_norm/mean``, ``spectral_norm/max``, ``spectral_norm/<matrix>``; ``rms_operator_norm/...``.

    Args:
        every_n_steps: how often to measure; None for the Trainer's ``log_every_n_steps``.
        rms: whether to log ``rms_operator_norm`` too.
        include: and all others: as in :class:`~lightning_muon.callbacks.spectral_monitor.SpectralMonitor`.

    Raises:
        MisconfigurationException: for values out of range, and globs that match nothing.

    Example::

        >>> trainer = Trainer(callbacks=[SpectralNormMonitor(every_n_steps=50, per_parameter=True)])
    """

    name = "spectral_norm"

    def __init__(
        self,
        every_n_steps: int | None = None,
        rms: bool = False,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        per_parameter: bool = False,
        print_table: bool = True,
        plot: bool = True,
        parameter_rules: list[ParameterRule] | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            every_n_steps,
            include=include,
            exclude=exclude,
            per_parameter=per_parameter,
            print_table=print_table,
            plot=plot,
            parameter_rules=parameter_rules,
            prefix=prefix,
        )
        self.rms = rms
        norm = Quantity("spectral_norm", "weight", Depth.NORM, _norm, "max", "doubled", "spectral norm")
        scaled = Quantity("rms_operator_norm", "weight", Depth.NORM, _rms_norm, "max", "doubled", "RMS operator norm")
        self.quantities = [norm, scaled] if rms else [norm]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "rms": self.rms}


def _norm(spectra: Spectra, shape: tuple[int, int]) -> Tensor:
    return spectra.spectral_norm


def _rms_norm(spectra: Spectra, shape: tuple[int, int]) -> Tensor:
    m, n = shape
    return spectra.spectral_norm * math.sqrt(n / m)
