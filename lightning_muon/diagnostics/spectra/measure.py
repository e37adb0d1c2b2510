"""The exact spectra of matrices by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich import get_console
from rich.progress import track
from torch import Tensor

from lightning_muon.diagnostics.matrices import WatchedParameter
from lightning_muon.diagnostics.spectra.histories import Histories
from lightning_muon.linalg import exact_spectra

QUANTITIES = {
    "spectral_norm": "spectral norm",
    "stable_rank": "stable rank",
    "participation_ratio": "participation ratio",
    "effective_rank": "effective rank",
    "condition_number": "condition number",
}
"""What is measured of each matrix, and what it is called in words."""

_STACK_NUMBERS = 2**22


class Spectrum(NamedTuple):
    """One matrix: its shape (m, n), the quantities by key, and its singular values (r,)."""

    shape: tuple[int, int]
    values: Mapping[str, float]
    singular_values: Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """One checkpoint.

    Args:
        label: what the user calls it.
        step: its ``global_step``; None if it has none.
        spectra: the spectrum of each matrix, by name.
        histories: what to draw of that which monitors had measured until then.
    """

    label: str
    step: int | None
    spectra: Mapping[str, Spectrum]
    histories: Histories

    def __str__(self) -> str:
        return self.label if self.step is None else f"{self.label} (step {self.step})"


def read_matrices(parameters: Iterable[WatchedParameter]) -> dict[str, Tensor]:
    """Every matrix (m, n) by its name."""
    matrices = {}
    for parameter in parameters:
        views = zip(parameter.matrices, parameter.read(parameter.parameter.detach()), strict=True)
        matrices.update({name: matrix for names, stack in views for name, matrix in zip(names, stack, strict=True)})
    return matrices


def measure(matrices: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    """Exact spectra of all matrices (m, n), by name; those of the same shape together, as far as memory allows."""
    alike: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for name, matrix in matrices.items():
        alike.setdefault((matrix.shape, matrix.dtype), []).append(name)
    stacks = []
    for (shape, _), names in alike.items():
        count = max(1, _STACK_NUMBERS // shape.numel())
        stacks += [names[start : start + count] for start in range(0, len(names), count)]
    found: dict[str, Spectrum] = {}
    console = get_console()
    for names in track(stacks, "Singular values", console=console, transient=True, disable=not console.is_terminal):
        stack = torch.stack([matrices[name] for name in names])
        spectra = exact_spectra(stack if stack.itemsize > 1 else stack.float())
        rows = zip(
            spectra.spectral_norm.tolist(),
            spectra.stable_rank.tolist(),
            spectra.participation_ratio.tolist(),
            spectra.effective_rank.tolist(),
            spectra.condition_number().tolist(),
            strict=True,
        )
        assert spectra.singular_values is not None
        for name, row, values in zip(names, rows, spectra.singular_values, strict=True):
            m, n = matrices[name].shape
            found[name] = Spectrum((m, n), dict(zip(QUANTITIES, row, strict=True)), values)
    return {name: found[name] for name in matrices}
