"""Figures of the monitors' measurements. They need matplotlib, but not pyplot and its global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_muon.diagnostics.drawing import colour_of, is_wide, name_quantity, new_figure, two_lines
from lightning_muon.diagnostics.history import History
from lightning_muon.diagnostics.matrices import evenly_chosen

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_PANELS = 12
_DECADES = 5  # of singular values shown, below the largest


def figures_available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def spectra_plot(snapshots: Mapping[str, Mapping[str, Tensor]], title: str) -> Figure:
    """The shape of each matrix's spectrum, s_i / s_1 against i / r, at several times.

    A panel a matrix; of more than twelve matrices twelve are drawn, evenly chosen, and the title says so. Panels share
    their axis where all have the same r. The first snapshot is dashed, the last one stronger. Five decades are shown at
    most, so that singular values of rounding size do not flatten the rest.

    Args:
        snapshots: a label such as ``"step 49"`` -> the matrix's name -> its singular values (r,), in any order.
        title: above the figure.

    Raises:
        ValueError: there is no matrix in the snapshots.
    """
    names = list(dict.fromkeys(name for matrices in snapshots.values() for name in matrices))
    if not names:
        raise ValueError(f"The snapshots {list(snapshots)} hold no singular values to draw")
    chosen = evenly_chosen(names, _PANELS)
    columns = len(chosen) if len(chosen) <= 3 else math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    figure = new_figure(max(2.9 * columns, 4.6), 2.0 * rows + 1.3)
    alike = len({values.numel() for of in snapshots.values() for name, values in of.items() if name in chosen}) == 1
    panels = figure.subplots(rows, columns, sharex=True, sharey=alike, squeeze=False).flatten().tolist()
    drawn = [
        _draw_spectra(panel, name, {label: of.get(name) for label, of in snapshots.items()})
        for panel, name in zip(panels, chosen, strict=False)
    ]
    for index, panel in enumerate(panels):
        panel.set_visible(index < len(chosen))
        panel.tick_params(labelbottom=index + columns >= len(chosen), labelsize=8)
        if index < len(chosen):
            _scale(panel, [curve for curves in (drawn if alike else [drawn[index]]) for curve in curves])
    panels[0].set_xlim(0, 1.03)
    panels[0].set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
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
    figure = new_figure(3.4 * columns + 1.2, 2.5 * rows + 1.0)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel, (key, words) in zip(panels, quantities, strict=False):
        low, high = math.inf, -math.inf
        for index, (label, histories) in enumerate(runs.items()):
            colour = colour_of(index, len(runs))
            steps, means, lows, highs = _course(histories.get((key, words), History()))
            low, high = min([low, *lows]), max([high, *highs])
            panel.plot(steps, means, label=label, color=colour, marker="o" if len(steps) <= 2 else None)
            panel.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)
        if is_wide(low, high):
            panel.set_yscale("log")
        name_quantity(panel, key, words)
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
    """Whether a logger shows figures, as those of TensorBoard and Weights & Biases do, in both Lightning namespaces."""
    return not {"TensorBoardLogger", "WandbLogger"}.isdisjoint(kind.__name__ for kind in type(logger).__mro__)


def publish(figures: Mapping[str, Figure], loggers: Sequence[Logger], step: int) -> None:
    """Send figures to every logger that shows figures.

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
    from matplotlib.image import imsave

    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{tag.replace('/', '_')}.png" for tag in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        canvas: Any = figure.canvas
        canvas.draw()
        imsave(path, canvas.buffer_rgba())  # savefig would draw twice
    return paths


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
    """Draw one matrix at several steps; returns the curves. A missing or empty one gets a line too, for the legend."""
    curves = [_relative(values) for values in spectra.values()]
    for index, (label, curve) in enumerate(zip(spectra, curves, strict=True)):
        first, last = index == 0 and len(curves) > 1, index == len(curves) - 1
        panel.plot(
            [(rank + 1) / len(curve) for rank in range(len(curve))],
            curve,
            label=label,
            color=colour_of(index, len(curves)),
            linestyle="--" if first else "-",
            linewidth=1.8 if last else 1.2,
            marker="o" if len(curve) <= 16 else None,
            markersize=3,
        )
    size = max(map(len, curves))
    panel.set_title(two_lines(name), fontsize=7, family="monospace")
    panel.text(0.04, 0.06, f"r = {size}" if size else "all zero or not finite", transform=panel.transAxes, fontsize=8)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    return curves


def _scale(panel: Axes, curves: Sequence[Sequence[float]]) -> None:
    """A logarithmic axis from the largest singular value down to the smallest, in whole decades."""
    from matplotlib.ticker import NullLocator

    smallest = min((value for curve in curves for value in curve if value > 0), default=1.0)
    decades = min(max(math.ceil(-math.log10(smallest)), 1), _DECADES)
    panel.set_yscale("log")
    panel.set_ylim(10.0**-decades, 1.4)
    # Plain labels and no minor ticks: with them drawing takes twice as long.
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_yticks([10.0**-decade for decade in range(decades + 1)], [f"{10.0**-d:g}" for d in range(decades + 1)])


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
