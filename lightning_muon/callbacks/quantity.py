"""Quantity: something that a monitor reports of each matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_muon.callbacks.probe import Depth, Kind
from lightning_muon.linalg import Spectra


@dataclass(frozen=True)
class Quantity:
    """Something that a monitor reports of each matrix.

    Args:
        key: under which it is logged.
        kind: of the weights or of the updates.
        depth: what has to be measured for it.
        measure: from spectra and (m, n) to a value a matrix.
        extreme: which aggregate besides the mean tells of trouble.
        alarm: which change between two tables is worth a warning.
        label: for axes.
    """

    key: str
    kind: Kind
    depth: Depth
    measure: Callable[[Spectra, tuple[int, int]], Tensor]
    extreme: Literal["max", "min"]
    alarm: Literal["doubled", "halved"] | None
    label: str
