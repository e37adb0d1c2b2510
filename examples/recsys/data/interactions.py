"""Your own interactions, from a text or Parquet file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from examples.recsys.data.counts import counted
from examples.recsys.data.events import Event, Numbered, k_core, number
from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.protocol import EvaluationProtocol, LeaveOneOut, TimeSplit
from examples.recsys.data.sequences import UserSequences
from examples.recsys.data.tables import Table, TextFormat
from examples.recsys.data.times import UNITS, Clock, Time, TimeUnit

PROTOCOLS: dict[str, type[LeaveOneOut] | type[TimeSplit]] = {"leave_one_out": LeaveOneOut, "time": TimeSplit}


@dataclass
class TitleFile(TextFormat):
    """A Parquet or text file with the titles of items, one per row.

    Args:
        path: path of the file.
        item_column: name of the column of items, which have the same names as in the interactions.
        title_column: name of the column of titles.
        delimiter: as in :class:`TextFormat`.
        columns: as in :class:`TextFormat`.
        encoding: as in :class:`TextFormat`.
        quoted: as in :class:`TextFormat`.
    """

    path: str
    item_column: str = "item"
    title_column: str = "title"


class Interactions(SequenceDataModule):
    r"""Rows of user, item and time from a file, in any order.

    Users and items may have any names. They are numbered from 1 in order of appearance, users in the file and items in
    the sequences. Number ``n`` stands for ``user_ids[n - 1]`` or ``item_ids[n - 1]``. The same file gives the same
    numbers. A changed file may give others: one more row may renumber all items after it.

    The rows of a user are sorted by time, with all digits of the file. Rows at exactly the same time keep the order of
    the file, and repeated rows are kept. :meth:`report`, and a warning when the file is read, count these cases and
    list the other decisions.

    Args:
        path: a ``.parquet`` file (needs pyarrow), or else text with a header line; gzipped or not.
        user_column: name of the column of users. RecBole's ``user_id:token`` is ``user_id``, and so for the others.
        item_column: name of the column of items.
        time_column: name of the column of times: numbers, or dates as ``2024-05-31`` or ``2024-05-31T12:00:00+02:00``
            (UTC without a time zone).
        title_column: name of the column of titles, if there is one. If an item has several titles, the first counts; if
            it has none, its name serves as title.
        time_unit: unit of numeric times: seconds, milliseconds, microseconds or nanoseconds since 1970; ``"date"`` if
            their digits are a date, as 20240531 or 20240531123000.
        delimiter: separator of the columns of a text file, one character or several; tab may be written ``\t``.
        split: ``"leave_one_out"`` holds out the last items of each user, ``"time"`` the latest interactions of all.
        k_core: drop users and items with fewer interactions, repeatedly until none is left; 1 keeps all.
        mask_history: whether validation leaves the items of the history out of the ranking; None does so for
            ``split="leave_one_out"`` only.
        columns: names of all columns in order, for a text file without a header.
        encoding: encoding of a text file: ``utf-8``, ``latin-1``, ``utf-16``, ...
        quoted: whether values of a text file may be in double quotes, as in CSV. None: no if the delimiter is a tab or
            has several characters; otherwise yes, but a quoted value that seems to hold rows is refused.
        title_file: a separate file with the titles, in place of ``title_column``; a string is the path of a file with
            the columns ``item`` and ``title``.
        drop_duplicates: whether to keep only the first of the rows with the same user, item and time.
        **kwargs: arguments of :class:`SequenceDataModule`.

    Raises:
        ValueError: if an argument is none of the above.
    """

    def __init__(
        self,
        path: str,
        user_column: str = "user",
        item_column: str = "item",
        time_column: str = "timestamp",
        title_column: str | None = None,
        time_unit: TimeUnit = "s",
        delimiter: str = ",",
        split: Literal["leave_one_out", "time"] = "leave_one_out",
        k_core: int = 1,
        mask_history: bool | None = None,
        columns: Sequence[str] | None = None,
        encoding: str = "utf-8",
        quoted: bool | None = None,
        title_file: str | TitleFile | None = None,
        drop_duplicates: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(mask_history=split == "leave_one_out" if mask_history is None else mask_history, **kwargs)
        if split not in PROTOCOLS:
            raise ValueError(f"split must be one of {', '.join(map(repr, PROTOCOLS))}, got {split!r}.")
        if time_unit not in UNITS:
            raise ValueError(f"time_unit must be one of {', '.join(map(repr, UNITS))}, got {time_unit!r}.")
        if k_core < 1:
            raise ValueError(f"k_core must be 1 or more, got {k_core}.")
        if title_column is not None and title_file is not None:
            raise ValueError(f"Titles come from title_column={title_column!r} or from a title_file: give one of them.")
        self.path = Path(path).expanduser()
        self.columns = {"user_column": user_column, "item_column": item_column, "time_column": time_column}
        self.title_column = title_column
        self.title_file = TitleFile(title_file) if isinstance(title_file, str) else title_file
        self.time_unit: TimeUnit = time_unit
        self.format = TextFormat(delimiter=delimiter, columns=columns, encoding=encoding, quoted=quoted)
        self.split = split
        self.k_core = k_core
        self.drop_duplicates = drop_duplicates

    @property
    def num_items(self) -> int:
        """Size of the catalogue; reads the file."""
        return len(self._log.numbered.items)

    @property
    def user_ids(self) -> list[Hashable]:
        """Names of users 1, 2, ... in the file."""
        return self._log.numbered.users

    @property
    def item_ids(self) -> list[Hashable]:
        """Names of items 1, 2, ... in the file."""
        return self._log.numbered.items

    def item_names(self) -> list[str]:
        """Names of items 1, 2, ... in the file, as text."""
        return [str(item) for item in self.item_ids]

    def item_titles(self) -> list[str]:
        """Titles of items 1, 2, ...; the name of an item without a title."""
        return [self._log.titles.get(name, name) for name in self.item_names()]

    def user_names(self) -> list[str]:
        """Names of users 0, 1, ... in the file, as text."""
        return [str(user) for user in self.user_ids]

    def item_fingerprint(self) -> str:
        """A hash of the names of the items in their order."""
        return hashlib.sha256("\n".join(map(repr, self.item_ids)).encode()).hexdigest()

    def report(self) -> list[str]:
        """Decisions in reading the file, one sentence each."""
        return self._log.report

    def load_sequences(self) -> UserSequences:
        return self._log.numbered.sequences

    def make_protocol(self, sequences: UserSequences) -> EvaluationProtocol:
        return PROTOCOLS[self.split](sequences, self.max_length, self.samples)

    @cached_property
    def _log(self) -> _Log:
        """Contents of the file, read once.

        Raises:
            FileNotFoundError: if the file does not exist.
            ImportError: if it is Parquet and pyarrow is not installed.
            ValueError: if it lacks a column, a row is not as described, times are in another unit, or a user has too
                few interactions to split.
        """
        columns = self.columns if self.title_column is None else {**self.columns, "title_column": self.title_column}
        table, clock = Table(self.path, columns, self.format), Clock(self.time_unit)
        titles = _Titles()
        events = list(self._events(table, clock, titles))
        if fault := clock.fault():
            raise ValueError(f"{self.path}, column {self.columns['time_column']}: {fault}")
        report = [*table.remarks(), *clock.remarks(len(events))]
        events = self._without_duplicates(events, report)
        events = self._core(events, report)
        _remark_unsorted(events, report)
        numbered = number(events)
        if ties := numbered.sequences.tie_remark():
            report.append(ties)
        self._check_lengths(numbered)
        if self.title_file is not None:
            titles.read(self.title_file, {str(item) for item in numbered.items}, self.path, report)
        elif self.title_column is not None:
            titles.remark({str(item) for item in numbered.items}, self.path, report)
        if report:
            rank_zero_warn("\n  ".join([f"What was decided in reading {self.path}:", *report]))
        return _Log(numbered, titles, report)

    def _events(self, table: Table, clock: Clock, titles: _Titles) -> Iterator[Event]:
        """Yield all rows in the order of the file."""
        for where, user, item, time, *title in table:
            for name, value in zip(self.columns.values(), (user, item, time), strict=True):
                if value is None or value == "" or value != value:
                    raise ValueError(f"{self.path}, {where} has no {name}: drop such rows.")
            try:
                seconds = clock.read(time, where)
            except ValueError as error:
                header = where == "line 1" and "; leave columns out if the first line is a header"
                raise ValueError(
                    f"{self.path}, {where}: {self.columns['time_column']} {error}{header or ''}."
                ) from None
            if title:
                titles.add(item, title[0])
            yield Event(user, item, seconds)

    def _without_duplicates(self, events: list[Event], report: list[str]) -> list[Event]:
        unique = list(dict.fromkeys(events))
        repeats = len(events) - len(unique)
        if not repeats:
            return events
        done = "dropped" if self.drop_duplicates else "kept (drop_duplicates=True keeps the first of each)"
        repeat = counted(repeats, f"of {len(events)} rows repeats", f"of {len(events)} rows repeat")
        report.append(f"{repeat} user, item and time of an earlier one: {done}.")
        return unique if self.drop_duplicates else events

    def _core(self, events: list[Event], report: list[str]) -> list[Event]:
        core = k_core(events, self.k_core)
        if not core:
            raise ValueError(f"{self.path} has no interactions" + (f" in its {self.k_core}-core." * (self.k_core > 1)))
        if len(core) < len(events):
            users, items = (len({row[column] for row in events} - {row[column] for row in core}) for column in (0, 1))
            gone = f"{counted(users, 'user', 'users')} and {counted(items, 'item', 'items')}"
            report.append(
                f"k_core={self.k_core} dropped {len(events) - len(core)} of {len(events)} rows, with them {gone}."
            )
        return core

    def _check_lengths(self, numbered: Numbered) -> None:
        lengths = numbered.sequences.offsets.diff()
        least = PROTOCOLS[self.split].shortest
        short = (lengths < least).nonzero().flatten().tolist()
        if short:
            raise ValueError(
                f"{self.path}: user {numbered.users[short[0]]!r} has "
                f"{counted(int(lengths[short[0]]), 'interaction', 'interactions')}, but split={self.split!r} needs "
                f"{least} ({counted(len(short), f'of {len(lengths)} users has', f'of {len(lengths)} users have')} "
                f"fewer): drop such users, or set k_core={least} or more."
            )


class _Log(NamedTuple):
    """Contents of a file, and the decisions in reading it."""

    numbered: Numbered
    titles: _Titles
    report: list[str]


class _Titles(dict[str, str]):
    """Titles by the names of items; the first if an item has several."""

    def __init__(self) -> None:
        super().__init__()
        self._ambiguous: set[str] = set()

    def add(self, item: Any, title: Any) -> None:
        """Store a title unless it is missing or the item has one."""
        if title in (None, "") or title != title:
            return
        if self.setdefault(str(item), str(title)) != str(title):
            self._ambiguous.add(str(item))

    def read(self, file: TitleFile, items: set[str], log: Path, report: list[str]) -> None:
        """Add the titles of items from a file.

        Raises:
            ValueError: if the file has none of the items.
        """
        path = Path(file.path).expanduser()
        format = TextFormat(**{field.name: getattr(file, field.name) for field in fields(TextFormat)})
        columns = {"item_column": file.item_column, "title_column": file.title_column}
        table = Table(path, columns, format)
        found: Counter[str] = Counter()
        for _, item, title in table:
            found[str(item)] += 1
            if str(item) in items:
                self.add(item, title)
        if items.isdisjoint(found):
            raise ValueError(
                f"{path} has titles of none of the items of {log}: its column {file.item_column} has names such as "
                f"{next(iter(found), None)!r}, {log.name} names such as {min(items)!r}."
            )
        report += (f"{path.name}: {remark}" for remark in table.remarks())
        self.remark(items, path, report)

    def remark(self, items: set[str], path: Path, report: list[str]) -> None:
        """Report the decisions about the titles of items."""
        if untitled := len(items - self.keys()):
            lack = counted(untitled, f"of {len(items)} items has", f"of {len(items)} items have")
            report.append(f"{lack} no title in {path.name}: the name serves as title.")
        if ambiguous := len(self._ambiguous & items):
            report.append(
                f"{counted(ambiguous, 'item has', 'items have')} several titles in {path.name}: the first counts."
            )


def _remark_unsorted(events: list[Event], report: list[str]) -> None:
    latest: dict[Hashable, Time] = {}
    unsorted = set()
    for event in events:
        if event.time < latest.setdefault(event.user, event.time):
            unsorted.add(event.user)
        latest[event.user] = event.time
    if unsorted:
        report.append(f"Rows are not in order of time for {len(unsorted)} of {len(latest)} users: sorted by time.")
