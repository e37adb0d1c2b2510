"""The partition as a table for the user."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lightning_muon.partition.names import INDEX
from lightning_muon.partition.roles import ParameterAssignment
from lightning_muon.tables import DottedText

_SHAPES_SHOWN = 2
_SHAPE_WIDTH = 18
_FRAME = 11  # what a table takes besides its cells
_LEAST_WIDTH = 12
_ROOM_FOR_WORDS = 32  # of names and reasons together
_REASON_LINES = 2
_CLAUSE_END = re.compile(r"[:;,.](?=\s|$)")
_CLASS_PATH = re.compile(r"\b(?:\w+\.)+(\w+)")


class PartitionTable:
    """The partition for Rich: one row for all parameters whose names differ only by indices and that are treated alike.

    ``"blocks.*.attn.in_proj_weight x12"`` stands for twelve parameters, and ``"192 x 64 as 3 of 64 x 64"`` for how each
    is read as matrices. Vectors, of which models have many, share a row where the reason is the same. Lines below count
    matrices and elements in each group. Where the reasons leave the names too little room, the rows have their first
    words, and the sentences stand below.

    Args:
        partition: the entries.
    """

    def __init__(self, partition: Sequence[ParameterAssignment]) -> None:
        alike: dict[tuple[str, ...], list[ParameterAssignment]] = {}
        for entry in partition:
            pattern = "" if entry.role == "vector" else INDEX.sub("*", entry.name)
            key = (pattern, entry.role, entry.group_name, entry.reason, str(entry.frozen))
            alike.setdefault(key, []).append(entry)
        self.rows = [_row(entries) for entries in alike.values()]
        self.caption = _caption(partition)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shape = min(_widest(row.shape for row in self.rows), _SHAPE_WIDTH)
        fixed = shape + sum(_widest(map(str, column)) for column in zip(*[row[2:4] for row in self.rows], strict=True))
        room = max(options.max_width - _FRAME - fixed, 2 * _LEAST_WIDTH)
        reasons, notes = [row.reason for row in self.rows], list[str]()
        wanted = min(_widest(row.name for row in self.rows), 3 * room // 5)
        if any(len(list(DottedText(reason).lines(room - wanted))) > _REASON_LINES for reason in reasons):
            reasons, notes = _footnotes(reasons, with_words=room >= _ROOM_FOR_WORDS)
        word = _widest(word for reason in reasons for word in reason.split())
        reason_width = min(_widest([*reasons, "reason"]), max(room - wanted, 2 * room // 5, word), room - _LEAST_WIDTH)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("parameters", max_width=room - reason_width)
        table.add_column("shape", max_width=shape)
        table.add_column("role", no_wrap=True)
        table.add_column("group")
        table.add_column("reason", max_width=reason_width)
        for row, reason in zip(self.rows, reasons, strict=True):
            cells = (DottedText(row.name), Text(row.shape), row.role, Text(row.group), DottedText(reason))
            table.add_row(*cells, style=row.style)
        yield table
        for number, note in enumerate(notes, start=1):
            mark = f"[{number}] "
            for line in DottedText(note).lines(options.max_width - len(mark)):
                yield Text(mark + line)
                mark = " " * len(mark)
        if notes:
            yield Text()
        yield Text(self.caption)


class Row(NamedTuple):
    """What stands in a row, and how."""

    name: str
    shape: str
    role: str
    group: str
    reason: str
    style: str


def _row(entries: Sequence[ParameterAssignment]) -> Row:
    first = entries[0]
    count = f" x{len(entries)}" if len(entries) > 1 else ""
    options = "".join(f"\n{key}={value}" for key, value in first.options.items())
    return Row(
        _pattern([entry.name for entry in entries]) + count,
        _shapes(entries),
        first.role,
        _group(first) + options,
        first.reason,
        "dim" if first.frozen else ("bold" if first.group == "matrix" else ""),
    )


def _footnotes(reasons: Sequence[str], with_words: bool) -> tuple[list[str], list[str]]:
    """The first words of each reason with the number of its footnote, where it says more, and the footnotes.

    Without words the number alone.
    """
    short: list[str] = []
    numbers: dict[str, int] = {}
    for reason in reasons:
        words = _CLASS_PATH.sub(r"\1", _CLAUSE_END.split(reason, maxsplit=1)[0])
        if with_words and words + "." == reason:
            short.append(reason)
            continue
        number = numbers.setdefault(reason, len(numbers) + 1)
        short.append(f"{words} [{number}]" if with_words else f"[{number}]")
    return short, list(numbers)


def _widest(texts: Iterable[str]) -> int:
    return max((len(line) for text in texts for line in text.splitlines()), default=0)


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
    return "\n".join(lines)


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
