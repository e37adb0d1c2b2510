"""Changes since the last table, as a table and as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_muon.diagnostics.quantity import Extreme, mean, worst
from lightning_muon.tables import DottedText, shortened

_LINES = 12
_LEAST_ROWS = 3
_ALARM_LINES = 4
_WIDTH_WITH_EXTREMES = 100
_NOTHING = "-"


class Movement(NamedTuple):
    """One quantity now and at the last table.

    Attributes:
        key: the quantity, such as ``"spectral_norm"``.
        step: when ``values`` were measured.
        values: now, by matrix.
        before: at the last table, by matrix; None where this is the first.
        extreme: which end of the values the user should know.
        alarm: which change of one matrix since the last table is an alarm.
        before_step: when ``before`` was measured, where known.
    """

    key: str
    step: int
    values: Mapping[str, float]
    before: Mapping[str, float] | None
    extreme: Extreme
    alarm: Literal["doubled", "halved"] | None
    before_step: int | None = None


class MonitorTable:
    """A Rich table of the changes with quantities, alarms, and the number of those left out.

    It has at most twelve lines, from 80 columns on.

    A line tells the mean and how it changed since the last table, the extreme where there is room, and which matrix
    moved most, and by how much. Mean and extreme are those that are logged; the line says how many values are not
    finite. Changes are of finite values of matrices measured both times. Where there are more quantities than lines,
    those are left out that raised no alarm and of which no matrix moved far. Of alarms those are told that take
    four lines, and the others counted.

    Args:
        movements: what was measured; at least one.
        title: above the table.
        whole: where all values are, a sentence.
    """

    def __init__(self, movements: Sequence[Movement], title: str, whole: str = "") -> None:
        self.movements = movements
        self.title = title
        self.whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        warnings = _first_lines(alarms(self.movements), width)
        room = _LINES - 2 - len(warnings)  # title and header take two lines
        count = len(self.movements)
        if count + len(self._left_out(count, width)) > room:
            count = max(room - len(self._left_out(0, width)), _LEAST_ROWS)
        shown = self._chosen(count)
        yield Text(f"\n{shortened(self.title, width)}", style="italic")
        yield _rows(shown, width)
        for line in warnings:
            yield Text(line, style="bold yellow")
        for line in self._left_out(len(shown), width):
            yield Text(line, style="dim")

    def _chosen(self, count: int) -> list[Movement]:
        """The movements to show, in their order: first those with alarms, then those that changed most."""

        def farthest(movement: Movement) -> float:
            if alarms([movement]):
                return math.inf
            return max((abs(math.log(factor)) for factor in _factors(movement).values()), default=0.0)

        order = sorted(range(len(self.movements)), key=lambda index: farthest(self.movements[index]), reverse=True)
        return [self.movements[index] for index in sorted(order[:count])]

    def _left_out(self, shown: int, width: int) -> list[str]:
        matrices = len({name for movement in self.movements for name in movement.values})
        count = len(self.movements)
        quantities = f"Shown: {shown} of {count} quantities, those that moved most. " if shown < count else ""
        all_of = f"All {matrices} matrices: " if matrices > 1 else ""
        whole = f"{all_of}{self.whole}" if self.whole else ""
        return list(DottedText(f"{quantities}{whole}".strip()).lines(width)) if quantities or whole else []


def alarms(movements: Sequence[Movement]) -> list[str]:
    """A sentence for each matrix whose value is NaN, infinite (where that is an alarm), has doubled or has halved.

    Quantity by quantity, the worst first.
    """
    return [sentence for movement in movements for sentence in (*_not_finite(movement), *_moved_too_far(movement))]


def _first_lines(sentences: Sequence[str], width: int) -> list[str]:
    """The first sentences, in a few lines, and the number of the others."""
    lines: list[str] = []
    for told, sentence in enumerate(sentences):
        more = list(DottedText(f"! {sentence}").lines(width))
        if lines and len(lines) + len(more) > _ALARM_LINES:
            return [*lines, f"! and {len(sentences) - told} more"]
        lines += more
    return lines


def _rows(movements: Sequence[Movement], width: int) -> Table:
    """One line per quantity; names are shortened to fit the width."""
    columns = ["quantity", "mean", "change", "extreme", "most", "of matrix"]
    rows = [_cells(movement) for movement in movements]
    if width < _WIDTH_WITH_EXTREMES:
        columns.pop(3)
        rows = [[*row[:3], *row[4:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    widths[0] = min(widths[0], width // 2)
    widths[-1] = max(min(widths[-1], width - sum(widths[:-1]) - 2 * (len(widths) - 1)), len(columns[-1]))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name, column_width in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "left" if name in (columns[0], columns[-1]) else "right"
        table.add_column(name, width=column_width, no_wrap=True, justify=justify)
    for key, *numbers, name in rows:
        table.add_row(*map(escape, (shortened(key, widths[0]), *numbers, shortened(name, widths[-1]))))
    return table


def _cells(movement: Movement) -> list[str]:
    """Quantity, mean, its change, extreme, and the matrix that changed most with its change."""
    if not movement.values:
        return [movement.key, *[_NOTHING] * 5]
    values = _finite(movement.values)
    extreme = movement.values[worst(movement.values, movement.extreme)]
    before = {name: value for name, value in _finite(movement.before or {}).items() if name in values}
    change = _percent(mean(values[name] for name in before), mean(before.values())) if before else _NOTHING
    factors = _factors(movement)
    most = max(factors, key=lambda name: abs(math.log(factors[name])), default=None)
    others = len(movement.values) - len(values)
    return [
        movement.key,
        _number(mean(movement.values.values())) + (f" ({others} not finite)" if others else ""),
        change,
        f"{movement.extreme} {_number(extreme)}",
        _percent(factors[most], 1.0) if most else _NOTHING,
        most or _NOTHING,
    ]


def _not_finite(movement: Movement) -> list[str]:
    # For a quantity without an alarm, infinity is an ordinary value.
    return [
        f"{movement.key} of {name} is {value} at step {movement.step}."
        for name, value in movement.values.items()
        if math.isnan(value) or (math.isinf(value) and movement.alarm is not None)
    ]


def _moved_too_far(movement: Movement) -> list[str]:
    factors = _factors(movement)
    if movement.alarm == "doubled":
        names = sorted((name for name in factors if factors[name] >= 2), key=factors.__getitem__, reverse=True)
    elif movement.alarm == "halved":
        names = sorted((name for name in factors if factors[name] <= 0.5), key=factors.__getitem__)
    else:
        names = []
    since = "the last table" if movement.before_step is None else f"step {movement.before_step}"
    before = movement.before or {}
    return [
        f"{movement.key} of {name} {movement.alarm}: "
        f"{_number(before[name])} -> {_number(movement.values[name])} since {since}."
        for name in names
    ]


def _factors(movement: Movement) -> dict[str, float]:
    """The factor by which each positive value has changed since the last table."""
    before = _finite(movement.before or {})
    now = _finite(movement.values)
    return {name: now[name] / before[name] for name in now if now[name] > 0 and before.get(name, 0) > 0}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _number(value: float) -> str:
    return f"{value:.4g}"


def _percent(now: float, before: float) -> str:
    """The change as a percentage, or as a factor from ten on."""
    if before == 0:
        return _NOTHING
    if now / before >= 10:
        return f"x {now / before:.3g}"
    percent = 100 * (now / before - 1)
    return f"{percent:+.1f} %" if abs(percent) < 10 else f"{percent:+.0f} %"
