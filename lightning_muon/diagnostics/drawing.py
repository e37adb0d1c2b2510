"""Helpers shared by all figures. They need matplotlib, but not pyplot and its global state."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "viridis"
LOG_RANGE = 100.0
"""A scale is logarithmic if its largest value is at least this many times its smallest."""

_NAME_LENGTH = 56
_PANEL_NAME_LENGTH = 40
_SMALL_PRINT: dict[str, Any] = {"fontsize": 8, "family": "monospace", "color": "0.35"}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sized in inches, that is not registered with pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def colour_of(index: int, count: int) -> Any:
    """The colour of a run or of a step, the same in all figures of one command."""
    from matplotlib import colormaps

    return colormaps[COLOURS](0.1 + 0.65 * index / max(count - 1, 1))


def is_wide(low: float, high: float) -> bool:
    """Whether values from ``low`` to ``high`` need a logarithmic scale."""
    return 0 < low < high / LOG_RANGE


def name_quantity(panel: Axes, key: str, words: str) -> None:
    """Set the title of a panel, with the logged key in small print below it."""
    small = two_lines(key)
    panel.annotate(small, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", **_SMALL_PRINT)
    panel.set_title(textwrap.fill(words, _PANEL_NAME_LENGTH), fontsize=9, loc="left", pad=18 + 11 * small.count("\n"))


def two_lines(name: str) -> str:
    """The name, with a line break at a dot if it is wider than a panel."""
    name = abridged(name)
    if len(name) <= _PANEL_NAME_LENGTH:
        return name
    dot = name.rfind(".", 0, _PANEL_NAME_LENGTH) + 1 or _PANEL_NAME_LENGTH
    return f"{name[:dot]}\n{name[dot:]}"


def abridged(name: str) -> str:
    """The name; a very long one without its middle, so that layer and kind stay readable."""
    if len(name) <= _NAME_LENGTH:
        return name
    start = _NAME_LENGTH // 3
    return f"{name[:start]}…{name[start + 1 - _NAME_LENGTH :]}"
