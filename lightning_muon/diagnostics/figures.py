"""Figures of what the monitors measured. They need matplotlib, but not pyplot and its global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_muon.diagnostics.history import History
from lightning_muon.diagnostics.matrices import evenly_chosen

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_COLOURS = "viridis"
_MISSING = "0.8"
_LOG_RANGE = 100.0
_PANELS = 12
_DECADES = 5  # of singular values shown, below the largest
_NAME_LENGTH = 56
_PANEL_NAME_LENGTH = 40
_SMALL_PRINT: dict[str, Any] = {"fontsize": 8, "family": "monospace", "color": "0.35"}


def figures_available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def heat_map(history: History, key: str, label: str, title: str) -> Figure:
    """All values of a history: a row a matrix, a column a measured step, colour for the value.

    Each column is centred at its step, so that steps are to scale. Colours are logarithmic where all values are
    positive and span more than a factor of 100. Grey is what was not measured or is not finite.

    Args:
        history: at least one value.
        key: the quantity, in small print below the title.
        label: what the colours mean, in words.
        title: above the figure.

    Raises:
        ValueError: the history is empty.
    """
    if not history.steps or not history.names:
        raise ValueError(f"The history of {key!r} has no values to draw; measure a step first")
    from matplotlib import colormaps

    values = [list(row) for row in zip(*history.array(), strict=True)]
    finite = [value for row in values for value in row if math.isfinite(value)]
    names = [_shortened(name) for name in history.names]
    height = min(max(0.19 * len(names), 1.4), 9.0)
    figure = _figure(6.0 + 0.062 * max(map(len, names)), height + 1.2)
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(
        _edges(history.steps),
        [index - 0.5 for index in range(len(names) + 1)],
        values,
        cmap=colormaps[_COLOURS].with_extremes(bad=_MISSING),
        norm=_norm(finite),
    )
    axes.set_facecolor(_MISSING)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    _name_rows(axes, names, height)
    _number_columns(axes, history.steps)
    axes.set_title(title, fontsize=11, loc="left", pad=19)
    axes.annotate(key, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", **_SMALL_PRINT)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=max(8.0, 4 * height), fraction=0.08)
    meaning = textwrap.fill(label, int(height / 0.075))
    bar.set_label(meaning if len(finite) == len(names) * len(history) else f"{meaning}\n(grey: no value)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def spectra_plot(snapshots: Mapping[str, Mapping[str, Tensor]], title: str) -> Figure:
    """The shape of each matrix's spectrum, s_i / s_1 against i / r, at several times.

    A panel a matrix; of more than twelve matrices twelve are drawn, evenly chosen, and the title says so. The first
    snapshot is dashed, the last one stronger. Five decades are shown at most, so that singular values of rounding
    size do not flatten the rest.

    Args:
        snapshots: a label such as ``"step 49"`` -> the matrix's name -> its singular values (r,), in any order.
        title: above the figure.

    Raises:
        ValueError: there is no matrix in the snapshots.
    """
    from matplotlib.ticker import NullFormatter

    names = list(dict.fromkeys(name for matrices in snapshots.values() for name in matrices))
    if not names:
        raise ValueError(f"The snapshots {list(snapshots)} hold no singular values to draw")
    chosen = evenly_chosen(names, _PANELS)
    columns = len(chosen) if len(chosen) <= 3 else math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    figure = _figure(max(2.9 * columns, 4.6), 2.0 * rows + 1.3)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    drawn = [
        curve
        for panel, name in zip(panels, chosen, strict=False)
        for curve in _draw_spectra(panel, name, {label: of.get(name) for label, of in snapshots.items()})
    ]
    smallest = min((value for curve in drawn for value in curve if value > 0), default=1.0)
    decades = min(max(math.ceil(-math.log10(smallest)), 1), _DECADES)
    panels[0].set_yscale("log")
    panels[0].set_ylim(10.0**-decades, 1.4)
    panels[0].set_xlim(0, 1.03)
    panels[0].set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    for index, panel in enumerate(panels):
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(labelbottom=index + columns >= len(chosen), labelsize=8)
        panel.set_visible(index < len(chosen))
    figure.supxlabel("index of the singular value, $i\\,/\\,r$", fontsize=9)
    figure.supylabel("singular value, $s_i\\,/\\,s_1$", fontsize=9)
    figure.legend(handles=panels[0].get_lines(), loc="outside right center", fontsize=8, frameon=False)
    part = f" ({len(chosen)} of {len(names)} matrices)" if len(chosen) < len(names) else ""
    figure.suptitle(title + part, fontsize=11)
    return figure


def course_plot(runs: Mapping[str, Mapping[tuple[str, str], History]], title: str) -> Figure:
    """Quantities over the steps of several runs: a panel a quantity, a line a run, its mean over the matrices.

    The band around a line reaches from the smallest to the largest matrix. Values that are not finite are left out.
    The axis is logarithmic where all values are positive and span more than a factor of 100.

    Args:
        runs: a label -> the quantity's key and its name in words -> its history. The words may be empty; quantities of
            one key and different words have panels of their own.
        title: above the figure.

    Raises:
        ValueError: there is no history in the runs.
    """
    quantities = list(dict.fromkeys(names for histories in runs.values() for names in histories))
    if not quantities:
        raise ValueError(f"The runs {list(runs)} hold no histories to draw")
    columns = min(len(quantities), 3)
    rows = math.ceil(len(quantities) / columns)
    figure = _figure(3.4 * columns + 1.2, 2.5 * rows + 1.0)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel, (key, words) in zip(panels, quantities, strict=False):
        low, high = math.inf, -math.inf
        for index, (label, histories) in enumerate(runs.items()):
            colour = _colour(index, len(runs))
            steps, means, lows, highs = _course(histories.get((key, words), History()))
            low, high = min([low, *lows]), max([high, *highs])
            panel.plot(steps, means, label=label, color=colour, marker="o" if len(steps) <= 2 else None)
            panel.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)
        if _wide(low, high):
            panel.set_yscale("log")
        _name_quantity(panel, key, words)
        panel.set_xlabel("optimizer step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(quantities) :]:
        panel.set_visible(False)
    panels[0].set_ylabel("mean; band: all matrices", fontsize=9)
    figure.legend(handles=panels[0].get_lines(), loc="outside lower left", fontsize=8, frameon=False, ncols=columns)
    figure.suptitle(title, fontsize=11)
    return figure


def shows_figures(logger: Logger) -> bool:
    """Whether a logger shows figures: TensorBoard's and Weights & Biases' do, of both Lightning namespaces."""
    return not {"TensorBoardLogger", "WandbLogger"}.isdisjoint(kind.__name__ for kind in type(logger).__mro__)


def publish(figures: Mapping[str, Figure], loggers: Sequence[Logger], step: int) -> None:
    """Show figures in every logger that can.

    Args:
        figures: by the tag they get.
        loggers: the Trainer's.
        step: the step they are logged at.
    """
    for logger in filter(shows_figures, loggers):
        target: Any = logger
        tensorboard = "TensorBoardLogger" in {kind.__name__ for kind in type(logger).__mro__}
        for tag, figure in figures.items():
            if tensorboard:
                target.experiment.add_figure(tag, figure, global_step=step)
            else:
                target.log_image(key=tag, images=[figure], step=step)


def save_pngs(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write each figure to ``<directory>/<tag>.png``, where a tag's slashes become underscores.

    Args:
        figures: by tag.
        directory: made where it is missing.

    Returns:
        The files, in the order of the figures.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{tag.replace('/', '_')}.png" for tag in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=160)
    return paths


def _figure(width: float, height: float) -> Figure:
    """An empty figure in inches that no window and no global list knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _colour(index: int, count: int) -> Any:
    """Of a run, or of a time: the same in all figures of one command."""
    from matplotlib import colormaps

    return colormaps[_COLOURS](0.1 + 0.65 * index / max(count - 1, 1))


def _shortened(name: str) -> str:
    """The name, its middle left out where it is very long: both the layer and the kind stay readable."""
    if len(name) <= _NAME_LENGTH:
        return name
    start = _NAME_LENGTH // 3
    return f"{name[:start]}…{name[start + 1 - _NAME_LENGTH :]}"


def _edges(steps: Sequence[int]) -> list[float]:
    """Borders of the columns: halfway between neighbouring steps, and as far beyond the first and the last."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(first + second) / 2 for first, second in pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def _norm(finite: Sequence[float]) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    if not finite:
        return Normalize(0, 1)
    low, high = min(finite), max(finite)
    return LogNorm(low, high) if _wide(low, high) else Normalize(low, high)


def _wide(low: float, high: float) -> bool:
    """Whether values from ``low`` to ``high`` take a logarithmic scale."""
    return 0 < low < high / _LOG_RANGE


def _name_rows(axes: Axes, names: Sequence[str], height: float) -> None:
    """Names beside the rows of a map of so many inches, and only every second or third where they would overlap."""
    thinning = math.ceil(len(names) * 9 / (72 * height))
    axes.set_yticks(range(0, len(names), thinning), names[::thinning], fontsize=7.5, family="monospace")
    if thinning > 1:
        axes.set_ylabel(f"{len(names)} matrices, one in {thinning} named", fontsize=9)


def _number_columns(axes: Axes, steps: Sequence[int]) -> None:
    """The very steps where each has room for its number, else round ones."""
    from matplotlib.ticker import MaxNLocator

    gaps = [second - first for first, second in pairwise(steps)]
    if len(steps) <= 8 and min(gaps, default=1) >= (steps[-1] - steps[0]) / 10:
        axes.set_xticks(steps)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("optimizer step", fontsize=9)


def _name_quantity(panel: Axes, key: str, words: str) -> None:
    """What it is called above a panel, and the key in small print below that."""
    small = _two_lines(key)
    panel.annotate(small, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", **_SMALL_PRINT)
    panel.set_title(textwrap.fill(words, _PANEL_NAME_LENGTH), fontsize=9, loc="left", pad=18 + 11 * small.count("\n"))


def _course(history: History) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and the mean, smallest and largest of the finite values at each."""
    rows = []
    for step, values in zip(history.steps, history.array(), strict=True):
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            rows.append((step, math.fsum(finite) / len(finite), min(finite), max(finite)))
    steps, means, lows, highs = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [])
    return steps, means, lows, highs


def _draw_spectra(panel: Axes, name: str, spectra: Mapping[str, Tensor | None]) -> list[list[float]]:
    """One matrix at several times; returns the curves. A missing or empty one has a line too, for the legend."""
    curves = [_relative(values) for values in spectra.values()]
    for index, (label, curve) in enumerate(zip(spectra, curves, strict=True)):
        first, last = index == 0 and len(curves) > 1, index == len(curves) - 1
        panel.plot(
            [(rank + 1) / len(curve) for rank in range(len(curve))],
            curve,
            label=label,
            color=_colour(index, len(curves)),
            linestyle="--" if first else "-",
            linewidth=1.8 if last else 1.2,
            marker="o" if len(curve) <= 16 else None,
            markersize=3,
        )
    size = max(map(len, curves))
    panel.set_title(_two_lines(name), fontsize=7, family="monospace")
    panel.text(0.04, 0.06, f"r = {size}" if size else "all zero or not finite", transform=panel.transAxes, fontsize=8)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    return curves


def _two_lines(name: str) -> str:
    """The name, broken at a dot where it is wider than a panel."""
    name = _shortened(name)
    if len(name) <= _PANEL_NAME_LENGTH:
        return name
    dot = name.rfind(".", 0, _PANEL_NAME_LENGTH) + 1 or _PANEL_NAME_LENGTH
    return f"{name[:dot]}\n{name[dot:]}"


def _relative(values: Tensor | None) -> list[float]:
    """Singular values by the largest, descending; NaN for zeros, which have no place on a logarithmic axis.

    Empty where there are none, where all are zero, and where some are not finite.
    """
    if values is None:
        return []
    ordered = sorted(values.detach().double().cpu().flatten().tolist(), reverse=True)
    if not ordered or not all(map(math.isfinite, ordered)) or ordered[0] <= 0:
        return []
    return [value / ordered[0] if value > 0 else math.nan for value in ordered]
