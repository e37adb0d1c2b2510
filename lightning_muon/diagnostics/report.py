"""What moved since the last table, as a table for the user and as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_muon.diagnostics.quantity import Extreme, mean, worst

_ALARMS_SHOWN = 5
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


def monitor_table(movements: Sequence[Movement], title: str) -> Table:
    """One row a quantity: its mean, its extreme, how the mean changed since the last table, and what moved most.

    Mean and extreme are those that are logged; the row says how many values are not finite. Changes are of finite
    values of matrices measured both times. Alarms stand under the table.
    """
    sentences = alarms(movements)
    caption = Text("\n".join(f"! {sentence}" for sentence in sentences), style="bold yellow") if sentences else None
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(title),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        expand=True,
        padding=(0, 1, 0, 0),
    )
    table.add_column("quantity", no_wrap=True)
    table.add_column("mean\n(change)", justify="right", no_wrap=True)
    table.add_column("extreme", overflow="fold", ratio=1)
    table.add_column("moved most", overflow="fold", ratio=1)
    for movement in movements:
        table.add_row(*map(escape, _cells(movement)))
    return table


def alarms(movements: Sequence[Movement]) -> list[str]:
    """A sentence for each matrix whose value is NaN or, alarmingly, infinite, has doubled or has halved; worst first.

    At most five a quantity, then one that counts the rest.
    """
    sentences: list[str] = []
    for movement in movements:
        found = [*_not_finite(movement), *_moved_too_far(movement)]
        sentences += found[:_ALARMS_SHOWN]
        if len(found) > _ALARMS_SHOWN:
            sentences.append(f"{movement.key}: and {len(found) - _ALARMS_SHOWN} more.")
    return sentences


def _cells(movement: Movement) -> list[str]:
    values = _finite(movement.values)
    others = len(movement.values) - len(values)
    key = f"{movement.key}\n({others} of {len(movement.values)} not finite)" if others else movement.key
    if not movement.values:
        return [key, *[_NOTHING] * 3]
    extreme = worst(movement.values, movement.extreme)
    before = {name: value for name, value in _finite(movement.before or {}).items() if name in values}
    factors = _factors(movement)
    most = max(factors, key=lambda name: abs(math.log(factors[name])), default=None)
    change = _percent(mean(values[name] for name in before), mean(before.values())) if before else ""
    return [
        key,
        f"{_number(mean(movement.values.values()))}\n{change}",
        f"{movement.extreme} {_number(movement.values[extreme])}\n{extreme}",
        f"{_percent(factors[most], 1.0)}\n{most}" if most else _NOTHING,
    ]


def _not_finite(movement: Movement) -> list[str]:
    # Of a quantity without an alarm infinity is a value as any other.
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
    """By how much each positive value was multiplied since the last table."""
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
