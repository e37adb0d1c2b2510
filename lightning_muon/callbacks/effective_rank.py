"""EffectiveRankMonitor: how many directions weights and updates use."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_muon.callbacks.spectral_monitor import SpectralMonitor
from lightning_muon.diagnostics import figures
from lightning_muon.diagnostics.probe import Depth, Kind, Measurement
from lightning_muon.diagnostics.quantity import Quantity
from lightning_muon.linalg import Spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EffectiveRankMonitor(SpectralMonitor):
    r"""Logs how many directions each weight matrix and each update uses, by three measures.

    With :math:`r = \min(m, n)` singular values :math:`\sigma_i` and :math:`p_i = \sigma_i / \sum_j \sigma_j`, each
    measure is in :math:`[1, r]`, and 0 for a matrix of zeros:

    * ``effective_rank`` :math:`\exp(-\sum_i p_i \ln p_i)`, by entropy (Roy and Vetterli, EUSIPCO 2007); it sees
      small directions best, and needs exact spectra;
    * ``participation_ratio`` :math:`(\sum_i \sigma_i^2)^2 / \sum_i \sigma_i^4`, how many directions share the energy;
    * ``stable_rank`` :math:`\|W\|_F^2 / \sigma_1^2`, how many are about as large as the largest.

    The weights are logged under these keys, the updates under ``update_effective_rank`` and so on. A value of r means
    that all directions are equal. Square random weights start near 0.8 r (effective rank), 0.5 r (participation) and
    0.25 r (stable rank). A slow fall is learning. A fall by half from one table to the next is a collapse, and the
    table warns of it. On SASRec updates of Muon had effective ranks of 0.93 to 0.99 r, participation ratios of 0.80 to
    0.91 r and stable ranks of 0.52 to 0.65 r; those of AdamW 0.2 to 0.75 r, 0.02 to 0.31 r and 0.02 to 0.14 r. Updates
    are measured as in :class:`~lightning_muon.callbacks.UpdateOrthogonalityMonitor`; updates of zero are left out.

    Keys: ``<quantity>/mean``, ``<quantity>/min``, ``<quantity>/<matrix>``.

    Args:
        every_n_steps: how often to measure; None for the Trainer's ``log_every_n_steps``.
        normalize: divide ranks by r, to [0, 1], to compare matrices of different sizes.
        **kwargs: as in :class:`~lightning_muon.callbacks.spectral_monitor.SpectralMonitor`.

    Raises:
        MisconfigurationException: for values out of range, and globs that match nothing.

    Example::

        >>> trainer = Trainer(callbacks=[EffectiveRankMonitor(every_n_steps=50, spectrum_every_n_steps=500)])
    """

    name = "effective_rank"

    def __init__(self, every_n_steps: int | None = None, normalize: bool = False, **kwargs: Any) -> None:
        super().__init__(every_n_steps, **kwargs)
        self.normalize = normalize
        self.quantities = [_quantity(name, kind, normalize) for kind in _KINDS for name in _DEPTHS]
        self.spectra: dict[str, dict[str, Any]] = {}
        """Singular values by matrix at the first and the last step at which they were computed, by kind."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "normalize": self.normalize}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "spectra": self.spectra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.spectra = dict(state_dict["spectra"])

    def forget(self) -> None:
        super().forget()
        self.spectra = {}

    def remember(self, step: int, measurements: Iterable[Measurement]) -> None:
        """Keeps the singular values of the first and of the last step at which they were computed."""
        if not self.clock.due_spectrum(step):
            return
        for kind in _KINDS:
            found = {
                name: row
                for measurement in measurements
                if measurement.kind == kind and measurement.spectra.singular_values is not None
                for name, row in zip(measurement.names, measurement.spectra.singular_values.unbind(), strict=True)
            }
            values = {name: found[name] for name in self.watched_matrices() if name in found}
            if values:
                snapshot = {"step": step, "values": values}
                self.spectra.setdefault(kind, {"first": snapshot})["last"] = snapshot

    def figures(self) -> dict[str, Figure]:
        """Heat maps, and the singular values of each matrix at the first and the last exact measurement."""
        drawn = super().figures()
        for kind, snapshots in self.spectra.items():
            labelled = {f"step {snapshot['step']}": snapshot["values"] for snapshot in snapshots.values()}
            drawn[self.key(f"{kind}_singular_values")] = figures.spectra_plot(labelled, f"Singular values of {kind}s")
        return drawn


_KINDS: tuple[Kind, ...] = ("weight", "update")

_DEPTHS = {"stable_rank": Depth.GRAM, "participation_ratio": Depth.GRAM, "effective_rank": Depth.SPECTRUM}


def _quantity(name: str, kind: Kind, normalize: bool) -> Quantity:
    label = name.replace("_", " ")
    return Quantity(
        name if kind == "weight" else f"update_{name}",
        kind,
        _DEPTHS[name],
        partial(_rank, name=name, normalize=normalize),
        "min",
        "halved" if kind == "weight" else None,  # updates change from step to step
        f"{label} / r" if normalize else label,
    )


def _rank(spectra: Spectra, shape: tuple[int, int], name: str, normalize: bool) -> Tensor:
    rank: Tensor = getattr(spectra, name)
    return rank / spectra.size if normalize else rank
