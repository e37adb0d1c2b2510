"""Names of parameters and of classes in print."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text
from torch import nn
from torch.nn.utils import parametrize

INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)|(?<=_l)\d+")
"""An index in a parameter's name: of a block, or of a layer of an RNN."""

_PIECE = re.compile(r"[^.\s]*[.\s]*")


class ParameterName:
    """A dotted name for a cell of a table: where it is too long for one line it breaks after dots and spaces.

    What is too long between two dots is broken anywhere. Square brackets are no markup.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    def lines(self, width: int) -> Iterator[str]:
        """The name in lines of at most ``width`` characters."""
        line = ""
        for piece in _PIECE.findall(self.name):
            if line and len(line) + len(piece.rstrip()) > width:
                yield line.rstrip()
                line = ""
            line += piece
            while len(line.rstrip()) > width:
                yield line[:width]
                line = line[width:]
        yield line.rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(self.lines(options.max_width)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest_piece = max(len(piece.rstrip()) for piece in _PIECE.findall(self.name))
        return Measurement(min(longest_piece, options.max_width), min(len(self.name), options.max_width))


def class_name(module: nn.Module) -> str:
    """The class of a module for a sentence: ``"Linear"`` for torch's, else with its path.

    ``torch_geometric.nn.dense.linear.Linear`` is not read as ``nn.Linear`` then. What parametrization puts before the
    name is left out.
    """
    kind = type(module)
    if kind.__name__.startswith("Parametrized") and parametrize.is_parametrized(module):
        kind = kind.__mro__[1]
    name = kind.__qualname__.rpartition("<locals>.")[2]
    if kind.__module__.startswith("torch."):
        return "Linear" if name == "NonDynamicallyQuantizableLinear" else name
    return f"{kind.__module__}.{name}"
