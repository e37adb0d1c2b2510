"""Times in logs: numbers in some unit since 1970, and ISO dates. Both are read without loss."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal, InvalidOperation
from typing import Any, Literal, TypeAlias, get_args

from examples.recsys.data.counts import counted

Time: TypeAlias = int | Decimal
"""Exact Unix seconds."""

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns", "date"]

UNITS: tuple[TimeUnit, ...] = get_args(TimeUnit)

NAMES: dict[TimeUnit, str] = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
    "date": "dates such as 20240531",
}

ERA = (631_152_000, 4_102_444_800)
"""Unix seconds of 1990 and 2100, the range of times in logs. No number lies in it in two units."""

LATEST = 1 << 33
"""Unix seconds in the year 2242; larger numbers are not in seconds."""


class Clock:
    """Reads the times of one file, and checks the unit by all of them.

    Args:
        unit: unit of numeric times: seconds, milliseconds, microseconds or nanoseconds since 1970; ``"date"`` if their
            digits are year, month and day, optionally followed by hour and minute, and second.
    """

    def __init__(self, unit: TimeUnit) -> None:
        self.unit: TimeUnit = unit
        self._numbers: list[tuple[Time, str]] = []  # the smallest and the largest, and where they stand
        self._range: tuple[Time, Time] | None = None
        self._unset = 0
        self._zones = {True: 0, False: 0}

    def read(self, value: Any, where: str) -> Time:
        """Convert a number, a date, or the text of either to Unix seconds.

        Args:
            value: the value in the file.
            where: its place in the file, for :meth:`fault`.

        Raises:
            ValueError: with the rest of the sentence "the time ...", if it is neither, or is far from our time.
        """
        number = _number(value)
        if number is None or self.unit == "date":
            time, has_zone = _from_date(value) if number is None else (_from_digits(number), True)
            if time is None:
                raise ValueError(
                    f"must be a date such as 20240531 or 20240531123000, as time_unit='date' says, got {value!r}"
                    + _advice(likely_unit(number))
                )
            self._zones[has_zone] += 1
            if abs(time) > LATEST:
                raise ValueError(f"{value!r} is far from our time: drop such rows")
        else:
            self._note_number(number, where)
            time = _scaled(number, self.unit)
        low, high = self._range or (time, time)
        self._range = min(low, time), max(high, time)
        self._unset += time < 365 * 86_400
        return time

    def fault(self) -> str | None:
        """Why the numbers cannot be in this unit, and which unit they look like; None if they can."""
        if not self._numbers:
            return None
        (low, low_place), (high, high_place) = self._numbers
        low_unit, high_unit = (self._unit_of(number) for number in (low, high))
        if (low_unit == "date") != (high_unit == "date"):
            # One end of a range of numbers may look like a date by chance.
            low_unit, high_unit = (None if unit == "date" else unit for unit in (low_unit, high_unit))
        if low_unit and high_unit and low_unit != high_unit:
            return (
                f"{low} ({low_place}) looks like {NAMES[low_unit]}, but {high} ({high_place}) like {NAMES[high_unit]}: "
                "bring all times to one unit."
            )
        for number, place, unit in ((high, high_place, high_unit), (low, low_place, low_unit)):
            year = 1970 + int(_scaled(number, self.unit)) // 31_556_952
            if unit not in (None, self.unit):
                return f"{number} ({place}) is in the year {year} in {NAMES[self.unit]}{_advice(unit)}."
            if unit is None and abs(_scaled(number, self.unit)) > LATEST:
                return (
                    f"{number} ({place}) is in the year {year} in {NAMES[self.unit]}, far from our time: set time_unit "
                    f"to its unit ({', '.join(map(repr, UNITS))}), or drop such rows."
                )
        return None

    def remarks(self, rows: int) -> list[str]:
        """Doubts about the times of a file with ``rows`` rows, one sentence each."""
        if self._range is None:
            return []
        low, high = self._range
        remarks = []
        if _is_usual(high) and self._unset:
            remarks.append(
                f"{counted(self._unset, 'time is', 'times are')} before 1971, the earliest on {_day(low)}: if these "
                "mean missing times, drop such rows."
            )
        if high < ERA[0] and high > rows:
            remarks.append(
                f"The times are from {_day(low)} to {_day(high)} in {NAMES[self.unit]}: if these are times and "
                "not just an order, set time_unit to their unit."
            )
        if high > datetime.now(UTC).timestamp() + 86_400:
            remarks.append(f"The latest time is {_day(high)}, which is in the future.")
        if all(self._zones.values()):
            unzoned = counted(self._zones[False], "date has", "dates have")
            remarks.append(f"{unzoned} no time zone, others do: those without are read as UTC.")
        return remarks

    def _note_number(self, number: Time, where: str) -> None:
        if not self._numbers:
            self._numbers = [(number, where)] * 2
        elif number < self._numbers[0][0]:
            self._numbers[0] = number, where
        elif number > self._numbers[1][0]:
            self._numbers[1] = number, where

    def _unit_of(self, number: Time) -> TimeUnit | None:
        return self.unit if _is_usual(_scaled(number, self.unit)) else likely_unit(number)


def likely_unit(number: Time) -> TimeUnit | None:
    """Return the unit in which a number is a time from 1990 to 2100; None if there is none."""
    for unit in _POWERS:
        if _is_usual(_scaled(number, unit)):
            return unit
    time = _from_digits(number)
    return "date" if time is not None and _is_usual(time) else None


_POWERS: dict[TimeUnit, int] = {"s": 0, "ms": -3, "us": -6, "ns": -9}
_EXACT = Context(prec=100)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UTC = re.compile(r"\s*(?:UTC|GMT)$")
_BELOW_MICROSECONDS = re.compile(r"[.,]\d{6}(\d+)")
_DIGITS = re.compile(r"(\d{4})(\d\d)(\d\d)(?:(\d\d)(\d\d)(?:(\d\d)(\.\d+)?)?)?")


def _number(value: Any) -> Time | None:
    """Convert to an exact number; None if it is not one. Text is not read as float64, which keeps 16 digits."""
    if isinstance(value, str):
        try:
            number = int(value) if value.isdecimal() and len(value) < 40 else Decimal(value.strip())
        except InvalidOperation:
            return None
    elif isinstance(value, float):
        number = Decimal(value)
    elif isinstance(value, (int, Decimal)):
        number = value
    else:
        return None
    if isinstance(number, Decimal) and not (number.is_finite() and abs(number.adjusted()) < 40):
        if number.is_zero():
            return 0
        raise ValueError(f"must be a number or an ISO date, got {value!r}")
    return number


def _is_usual(time: Time) -> bool:
    return ERA[0] <= time < ERA[1]


def _scaled(number: Time, unit: TimeUnit) -> Time:
    return number if unit == "s" else _EXACT.scaleb(Decimal(number), _POWERS[unit])


def _from_date(moment: Any) -> tuple[Time, bool]:
    """Unix seconds of a date, read as UTC without a time zone, and whether it has one."""
    text = moment.isoformat() if isinstance(moment, date) else moment
    try:
        parsed = datetime.fromisoformat(_UTC.sub("+00:00", text.strip()))
    except (AttributeError, ValueError):
        raise ValueError(f"must be a number or an ISO date, as 2024-05-31T12:30:00, got {moment!r}") from None
    since = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)) - _EPOCH
    # Python's datetime has no digits below microseconds.
    finer = _BELOW_MICROSECONDS.search(text)
    fraction = Decimal(f"0.{since.microseconds:06d}{finer[1] if finer else ''}")
    seconds = since.days * 86_400 + since.seconds
    return (_EXACT.add(Decimal(seconds), fraction) if fraction else seconds), parsed.tzinfo is not None


def _from_digits(number: Time) -> Time | None:
    """Unix seconds of 20240531, 202405311230, 20240531123000 or 20240531123000.25; None if it is not such a date."""
    text = f"{number:f}" if isinstance(number, Decimal) else str(number)
    match = _DIGITS.fullmatch(re.sub(r"\.0*$", "", text))
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction = match.groups(default="")
    try:
        return _from_date(f"{year}-{month}-{day}T{hour or '00'}:{minute or '00'}:{second or '00'}{fraction}")[0]
    except ValueError:
        return None


def _day(time: Time) -> str:
    return (_EPOCH + timedelta(seconds=int(time))).date().isoformat()


def _advice(unit: TimeUnit | None) -> str:
    return "" if unit is None else f"; it looks like {NAMES[unit]}: set time_unit={unit!r}"
