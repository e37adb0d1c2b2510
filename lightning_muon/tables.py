"""Helpers of all tables: names that break at dots, and a console that is wide enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich import get_console
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.text import Text

WIDTH_OF_FILES = 120
"""Columns of output without a known width, such as a log file, for which Rich assumes 80."""

_PIECE = re.compile(r"[^.\s]*[.\s]*")


def print_table(table: RenderableType) -> None:
    """Print on Rich's shared console, with the width of :func:`wide_console`."""
    with wide_console() as console:
        console.print(table)


@contextmanager
def wide_console() -> Iterator[Console]:
    """Rich's shared console, at least 120 columns wide if it is no terminal and nothing sets its width.

    COLUMNS, ``rich.reconfigure(width=...)`` and notebooks do.
    """
    console = get_console()
    width_set = getattr(console, "_width", None) is not None
    if console.is_terminal or width_set or console.width >= WIDTH_OF_FILES:
        yield console
        return
    console.width = WIDTH_OF_FILES
    try:
        yield console
    finally:
        console._width = None


class DottedText:
    """Text for a cell of a table; one that is too long for a line breaks after dots and spaces.

    What is too long between two of them is broken after an underscore, or else anywhere. Square brackets are no markup.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def lines(self, width: int) -> Iterator[str]:
        """The text in lines of at most ``width`` characters."""
        line = ""
        for piece in _PIECE.findall(self.text):
            if line and len(line) + len(piece.rstrip()) > width:
                yield line.rstrip()
                line = ""
            line += piece
            while len(line.rstrip()) > width:
                end = line.rfind("_", 1, width) + 1 or width
                yield line[:end]
                line = line[end:]
        yield line.rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(self.lines(options.max_width)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest_piece = max(len(piece.rstrip()) for piece in _PIECE.findall(self.text))
        return Measurement(min(longest_piece, options.max_width), min(len(self.text), options.max_width))


def shortened(name: str, width: int) -> str:
    """The name in at most ``width`` characters, with ellipses: its end, and the number of the layer before it.

    ``"encoder.layers.2.self_attn.in_proj_weight.q"`` gets ``"…layers.2.self_attn.in_proj_weight.q"``, or
    ``"…2…in_proj_weight.q"``, or ``"…weight.q"``.
    """
    parts = name.split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    candidates = [
        name,
        *(f"…{'.'.join(parts[start:])}" for start in range(1, layer + 1)),
        *(f"…{parts[layer]}…{'.'.join(parts[start:])}" for start in range(layer + 2, len(parts)) if layer),
    ]
    fitting = (candidate for candidate in candidates if len(candidate) <= width)
    return next(fitting, f"…{name[len(name) - max(width, 1) + 1 :]}")
