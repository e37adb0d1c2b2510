"""Quantity: a value that a monitor reports for each matrix, and its aggregates over many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from lightning_muon.diagnostics.probe import Depth, Kind
from lightning_muon.linalg import Spectra

Extreme: TypeAlias = Literal["max", "min"]


@dataclass(frozen=True)
class Quantity:
    """A value that a monitor reports for each matrix.

    Args:
        key: under which it is logged.
        kind: of the weights or of the updates.
        depth: what has to be measured for it.
        measure: from spectra and (m, n) to a value a matrix.
        extreme: which aggregate besides the mean tells of trouble.
        alarm: which change between two tables is worth a warning.
        label: what it is, in words, for figures: "stable rank of the updates".
        relative: whether heat maps show its ratio to the first measurement.
    """

    key: str
    kind: Kind
    depth: Depth
    measure: Callable[[Spectra, tuple[int, int]], Tensor]
    extreme: Extreme
    alarm: Literal["doubled", "halved"] | None
    label: str
    relative: bool = False


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not infinite; NaN if one is NaN, infinity if all are infinite."""
    numbers = list(values)
    finite = [value for value in numbers if not math.isinf(value)]
    return math.fsum(finite) / len(finite) if finite else numbers[0]


def worst(values: Mapping[str, float], extreme: Extreme) -> str:
    """Name of the largest or the smallest value; of one that is NaN if there is any."""
    undefined = next((name for name, value in values.items() if math.isnan(value)), None)
    if undefined is not None:
        return undefined
    return max(values, key=values.__getitem__) if extreme == "max" else min(values, key=values.__getitem__)
