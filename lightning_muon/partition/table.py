"""The partition as a table for the user."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lightning_muon.partition.names import INDEX
from lightning_muon.partition.roles import ParameterAssignment

_SHAPES_SHOWN = 2
_PIECE = re.compile(r"[^.\s]*[.\s]*")


def partition_table(partition: Sequence[ParameterAssignment]) -> Table:
    """One row for all parameters whose names differ only by indices and that are treated alike.

    ``"blocks.*.attn.in_proj_weight x12"`` stands for twelve parameters, and ``"192 x 64 as 3 of 64 x 64"`` for how each
    is read as matrices. Vectors, of which models have many, share a row where the reason is the same. The caption
    counts matrices and elements in each group.
    """
    rows: dict[tuple[str, ...], list[ParameterAssignment]] = {}
    for entry in partition:
        pattern = "" if entry.role == "vector" else INDEX.sub("*", entry.name)
        key = (pattern, entry.role, entry.group_name, entry.reason, str(entry.frozen))
        rows.setdefault(key, []).append(entry)
    with_options = any(entry.options for entry in partition)
    table = Table(box=box.SIMPLE_HEAD, caption=_caption(partition), caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("parameters", overflow="fold", ratio=6)
    table.add_column("shape", overflow="fold", ratio=4)
    table.add_column("role", no_wrap=True)
    table.add_column("group", overflow="fold", max_width=12)
    if with_options:
        table.add_column("options", overflow="fold", max_width=16)
    table.add_column("reason", overflow="fold", ratio=5)
    for entries in rows.values():
        first = entries[0]
        count = f" x{len(entries)}" if len(entries) > 1 else ""
        name = ParameterName(_pattern([entry.name for entry in entries]) + count)
        cells = [_shapes(entries), first.role, _group(first)]
        if with_options:
            cells.append("\n".join(f"{key}={value}" for key, value in first.options.items()))
        style = "dim" if first.frozen else ("bold" if first.group == "matrix" else "")
        table.add_row(name, *map(escape, [*cells, first.reason]), style=style)
    return table


class ParameterName:
    """A dotted name for a cell of a table; a name too long for one line breaks after dots and spaces.

    A piece between two dots that is still too long breaks anywhere. Square brackets are not markup.
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


def _pattern(names: Sequence[str]) -> str:
    """The names as one: ``*`` for the indices in which they differ, or for all between a common begin and end."""
    if len({INDEX.sub("*", name) for name in names}) > 1:
        parts = [name.split(".") for name in names]
        start, end = _common(parts), _common([part[::-1] for part in parts])[::-1]
        return ".".join([*start, "*", *end])
    indices = [INDEX.findall(name) for name in names]
    shown = iter([found[0] if len(set(found)) == 1 else "*" for found in zip(*indices, strict=True)])
    return INDEX.sub(lambda _: next(shown), names[0])


def _common(parts: Sequence[Sequence[str]]) -> list[str]:
    """The segments that all names begin with, short of the whole of the shortest name."""
    common = []
    for segments in list(zip(*parts, strict=False))[: min(map(len, parts)) - 1]:
        if len(set(segments)) > 1:
            break
        common.append(segments[0])
    return common


def _shapes(entries: Iterable[ParameterAssignment]) -> str:
    shapes = dict.fromkeys(_shape(entry) for entry in entries)
    more = len(shapes) - _SHAPES_SHOWN
    return "; ".join(list(shapes)[:_SHAPES_SHOWN]) + (f"; {more} more" if more > 0 else "")


def _shape(entry: ParameterAssignment) -> str:
    shape = " x ".join(map(str, entry.parameter.shape)) or "scalar"
    if entry.layout is None:
        return shape
    matrices = entry.layout.describe(entry.parameter.shape)
    return shape if matrices == shape else f"{shape} as {matrices}"


def _group(entry: ParameterAssignment) -> str:
    """Where the entry goes: the group, or the param group's own name where a rule made one."""
    if entry.frozen:
        return "frozen"
    return entry.group if entry.group_name in (entry.group, f"{entry.group}/{entry.role}") else entry.group_name


def _caption(partition: Sequence[ParameterAssignment]) -> str:
    trainable = [entry for entry in partition if not entry.frozen]
    total = _elements(trainable)
    lines = []
    for group in ("matrix", "other"):
        entries = [entry for entry in trainable if entry.group == group]
        count, size = _matrices(entries), _elements(entries)
        matrices = f"{count} {'matrix' if count == 1 else 'matrices'} in " if group == "matrix" else ""
        share = f"{_large(size)} of {_large(total)} {_noun('element', total)} ({100 * size / max(total, 1):.1f}%)"
        lines.append(f"{group}: {matrices}{len(entries)} {_noun('parameter', len(entries))}, {share}")
    if frozen := [entry for entry in partition if entry.frozen]:
        count, size = len(frozen), _elements(frozen)
        sizes = f"{_large(size)} {_noun('element', size)}"
        lines.append(f"frozen: {count} {_noun('parameter', count)}, {sizes}, in no optimizer")
    lines.append(f"param groups: {', '.join(dict.fromkeys(entry.group_name for entry in trainable)) or 'none'}")
    return escape("\n".join(lines))


def _noun(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _elements(entries: Iterable[ParameterAssignment]) -> int:
    return sum(entry.parameter.numel() for entry in entries)


def _matrices(entries: Iterable[ParameterAssignment]) -> int:
    return sum(
        count for entry in entries if entry.layout for count, _, _ in entry.layout.matrix_shapes(entry.parameter.shape)
    )


def _large(number: int) -> str:
    """A count in at most five characters and a unit: 987, 12.3 k, 4.56 M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return str(number)
