"""Spectra of checkpoints as tables for the user."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_muon.diagnostics.spectra.measure import QUANTITIES, Measured
from lightning_muon.partition.table import ParameterName

COMPARED = ("spectral_norm", "stable_rank", "effective_rank")
"""Those that tell checkpoints apart."""


def matrices_table(measured: Measured) -> Table:
    """One row a matrix, and their mean."""
    table = _table(
        str(measured), caption="Ranks are at most the smaller side r of the shape. The condition number is s_1 / s_r."
    )
    table.add_column("matrix", overflow="fold", ratio=1)
    table.add_column("shape", justify="right", no_wrap=True)
    for words in QUANTITIES.values():
        table.add_column(_header(words), justify="right", no_wrap=True)
    for name, spectrum in measured.spectra.items():
        m, n = spectrum.shape
        table.add_row(ParameterName(name), f"{m} x {n}", *(_number(spectrum.values[key]) for key in QUANTITIES))
    table.add_section()
    means = (_number(_mean(measured, list(measured.spectra), key)) for key in QUANTITIES)
    table.add_row(f"mean of {len(measured.spectra)}", "", *means)
    return table


def comparison_table(before: Measured, after: Measured, names: Sequence[str]) -> Table:
    """One row a matrix: a quantity in the one checkpoint, in the other, and the change."""
    table = _table(f"{before} -> {after}")
    table.add_column("matrix", overflow="fold", ratio=1)
    columns = []
    for key in COMPARED:
        table.add_column(QUANTITIES[key], justify="right", no_wrap=True)
        pairs = [(before.spectra[name].values[key], after.spectra[name].values[key]) for name in names]
        columns.append(_changes([*pairs, (_mean(before, names, key), _mean(after, names, key))]))
    *rows, means = zip(*columns, strict=True)
    for name, cells in zip(names, rows, strict=True):
        table.add_row(ParameterName(name), *cells)
    table.add_section()
    table.add_row(f"mean of {len(names)}", *means)
    return table


def course_table(checkpoints: Sequence[Measured], names: Sequence[str]) -> Table:
    """One row a checkpoint: mean and extreme of each quantity over the matrices."""
    table = _table(f"{len(names)} matrices in {len(checkpoints)} checkpoints")
    table.add_column("checkpoint", overflow="fold", ratio=1)
    table.add_column("step", justify="right", no_wrap=True)
    for key in COMPARED:
        table.add_column(f"{_header(QUANTITIES[key])}\nmean", justify="right", no_wrap=True)
        table.add_column("max" if key == "spectral_norm" else "min", justify="right", no_wrap=True, vertical="bottom")
    for measured in checkpoints:
        cells = [escape(measured.label), "" if measured.step is None else str(measured.step)]
        for key in COMPARED:
            values = [measured.spectra[name].values[key] for name in names]
            extreme = max(values) if key == "spectral_norm" else min(values)
            cells += [_number(_mean(measured, names, key)), _number(extreme)]
        table.add_row(*cells)
    return table


def _table(title: str, caption: str | None = None) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        title=escape(title),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )


def _header(words: str) -> str:
    """A word a line, so that columns are as narrow as their numbers and names have room."""
    return words.replace("participation", "partici-\npation").replace(" ", "\n")


def _mean(measured: Measured, names: Sequence[str], key: str) -> float:
    return sum(measured.spectra[name].values[key] for name in names) / len(names)


def _changes(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """``"1.23 -> 1.46 +18.7 %"`` for each pair, with the numbers of all pairs below each other."""
    cells = [(_number(before, 3), _number(after, 3), _percent(before, after)) for before, after in pairs]
    first, second, third = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [f"{before:>{first}} -> {after:>{second}} {change:>{third}}" for before, after, change in cells]


def _number(value: float, digits: int = 4) -> str:
    return f"{value:#.{digits}g}".rstrip(".")


def _percent(before: float, after: float) -> str:
    if before == 0 or not math.isfinite(after - before):
        return "-"
    percent = round(100 * (after / before - 1), 1) + 0.0  # no minus before zero
    return f"{percent:+.1f} %" if abs(percent) < 100 else f"{percent:+.3g} %"
