"""Heat maps of the monitors' measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_muon.diagnostics.drawing import COLOURS, LOG_RANGE, abridged, is_wide, name_quantity, new_figure
from lightning_muon.diagnostics.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DIVERGING = "RdBu_r"
_LEAST_RANGE = 0.1  # of the colours, over what they are about
_MISSING = "0.8"


class Map(NamedTuple):
    """The values of a heat map and how to show them.

    Attributes:
        key: the quantity, in small print.
        label: what it is, in words.
        history: at least one value.
        relative: whether each matrix is shown by the ratio to its first measurement, as weights are: what they were
            initialized with says less than how they move.
    """

    key: str
    label: str
    history: History
    relative: bool = False


def heat_maps(maps: Sequence[Map], title: str = "") -> Figure:
    """All values of histories, a panel each: a row a matrix, a column a measured step, colour for the value.

    Each column is centred at its step, so that steps are to scale. Colours are logarithmic where all values are
    positive and span more than a factor of 100; around a ratio of 1 they always are. They span 10 % at least, so that
    what hardly moves looks like it. Grey is what was not measured or is not finite.

    Args:
        maps: at least one; those of the same matrices share the names of the rows.
        title: above the figure.

    Raises:
        ValueError: there is no map, or a history is empty.
    """
    empty = [shown.key for shown in maps if not shown.history.steps or not shown.history.names]
    if empty or not maps:
        raise ValueError(f"The history of {', '.join(empty) or 'nothing'} has no values to draw; measure a step first")
    names = list(dict.fromkeys(name for shown in maps for name in shown.history.names))
    labels = [abridged(name) for name in names]
    height = min(max(0.19 * len(names), 1.4), 9.0)
    figure = new_figure(0.8 + 3.6 * len(maps) + 0.062 * max(map(len, labels)), height + (1.6 if title else 1.3))
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False).flatten().tolist()
    for panel, shown in zip(panels, maps, strict=True):
        _draw_map(figure, panel, shown, names, height)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    _name_rows(panels[0], labels, height)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw_map(figure: Figure, axes: Axes, shown: Map, names: Sequence[str], height: float) -> None:
    from matplotlib import colormaps

    measured = [list(row) for row in zip(*shown.history.array(), strict=True)]
    rows = dict(zip(shown.history.names, map(_ratios, measured) if shown.relative else measured, strict=True))
    values = [rows.get(name, [math.nan] * len(shown.history)) for name in names]
    finite = [value for row in values for value in row if math.isfinite(value)]
    mesh = axes.pcolormesh(
        _edges(shown.history.steps),
        [index - 0.5 for index in range(len(names) + 1)],
        values,
        cmap=colormaps[_DIVERGING if shown.relative else COLOURS].with_extremes(bad=_MISSING),
        norm=_around_one(finite) if shown.relative else _norm(finite),
    )
    axes.set_facecolor(_MISSING)
    axes.tick_params(labelsize=8)
    _number_columns(axes, shown.history.steps)
    name_quantity(axes, shown.key, shown.label)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=max(8.0, 4 * height), fraction=0.08)
    meaning = [f"ratio to the first, at step {shown.history.steps[0]}"] if shown.relative else []
    missing = ["grey: no value"] if len(finite) < len(names) * len(shown.history) else []
    bar.set_label("; ".join([*meaning, *missing]), fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if shown.relative:
        top = mesh.get_clim()[1] or 1.0
        ticks = [top**power for power in (-1, -0.5, 0, 0.5, 1)]
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
        bar.ax.minorticks_off()


def _ratios(values: Sequence[float]) -> list[float]:
    """Ratios to the first finite positive value; NaN where there is none, or where the ratio is not positive."""
    first = next((value for value in values if math.isfinite(value) and value > 0), math.nan)
    return [value / first if value > 0 else math.nan for value in values]


def _around_one(ratios: Sequence[float]) -> Any:
    """Logarithmic colours, symmetric around 1; each side spans at least 10 % and at most a factor of 100."""
    from matplotlib.colors import LogNorm

    farthest = max((max(ratio, 1 / ratio) for ratio in ratios), default=1.0)
    top = min(max(farthest, 1 + _LEAST_RANGE), LOG_RANGE)
    return LogNorm(1 / top, top, clip=True)


def _norm(finite: Sequence[float]) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    if not finite:
        return Normalize(0, 1)
    low, high = min(finite), max(finite)
    if is_wide(low, high):
        return LogNorm(low, high)
    middle = (low + high) / 2
    half = max((high - low) / 2, _LEAST_RANGE * abs(middle) / 2)
    return Normalize(middle - half, middle + half)


def _edges(steps: Sequence[int]) -> list[float]:
    """Borders of the columns: halfway between neighbouring steps, extended by half a step at both ends."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(first + second) / 2 for first, second in pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def _name_rows(axes: Axes, names: Sequence[str], height: float) -> None:
    """Label the rows of a map of this height in inches; skip rows whose labels would overlap."""
    thinning = math.ceil(len(names) * 9 / (72 * height))
    axes.set_yticks(range(0, len(names), thinning), names[::thinning], fontsize=7.5, family="monospace")
    if thinning > 1:
        axes.set_ylabel(f"{len(names)} matrices, one in {thinning} named", fontsize=9)


def _number_columns(axes: Axes, steps: Sequence[int]) -> None:
    """Ticks at the measured steps if their numbers fit, else at round steps."""
    from matplotlib.ticker import MaxNLocator

    gaps = [second - first for first, second in pairwise(steps)]
    if len(steps) <= 8 and min(gaps, default=1) >= (steps[-1] - steps[0]) / 10:
        axes.set_xticks(steps)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("optimizer step", fontsize=9)
