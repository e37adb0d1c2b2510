"""A user's own interactions, from a CSV or Parquet file."""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
from collections.abc import Hashable, Iterator
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from examples.recsys.data.events import Event, Numbered, k_core, number
from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.protocol import EvaluationProtocol, LeaveOneOut, TimeSplit
from examples.recsys.data.sequences import UserSequences

PROTOCOLS: dict[str, type[LeaveOneOut] | type[TimeSplit]] = {"leave_one_out": LeaveOneOut, "time": TimeSplit}

LATEST = 1 << 33
"""Unix seconds in the year 2242: what lies beyond is no count of seconds."""


class Interactions(SequenceDataModule):
    """Rows of user, item and time from a file, in any order.

    Users and items may be called anything. They are numbered from 1 in order of appearance, users in the file and items
    in the sequences; ``user_ids[n - 1]`` and ``item_ids[n - 1]`` tell what number ``n`` stands for. The same file gives
    the same numbers, and another one gives others.

    The rows of a user are sorted by time, with a warning where they were not; rows at the same time keep the order of
    the file. Rows that repeat are kept.

    Args:
        path: a ``.parquet`` file (needs pyarrow), or else text with a header line; gzipped if it ends in ``.gz``.
        user_column: name of the column of users.
        item_column: name of the column of items.
        time_column: name of the column of times: numbers, or dates as ``2024-05-31`` or ``2024-05-31T12:00:00+02:00``
            (UTC where they do not say).
        title_column: name of the column of titles, if there is one: of several for one item the first counts, and an
            item without one goes by what it is called.
        time_unit: unit of times that are numbers: seconds or milliseconds since 1970.
        delimiter: what separates the columns of a text file.
        split: ``"leave_one_out"``: the last items of each user are held out. ``"time"``: the latest interactions.
        k_core: drop users and items with fewer interactions, again and again until none is left; 1 keeps all.
        mask_history: whether validation leaves the items of the history out of the ranking; None does so for
            ``split="leave_one_out"`` only.
        **kwargs: of :class:`SequenceDataModule`.

    Raises:
        ValueError: if ``split``, ``time_unit`` or ``k_core`` is not one of the above.
    """

    def __init__(
        self,
        path: str,
        user_column: str = "user",
        item_column: str = "item",
        time_column: str = "timestamp",
        title_column: str | None = None,
        time_unit: Literal["s", "ms"] = "s",
        delimiter: str = ",",
        split: Literal["leave_one_out", "time"] = "leave_one_out",
        k_core: int = 1,
        mask_history: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(mask_history=split == "leave_one_out" if mask_history is None else mask_history, **kwargs)
        if split not in PROTOCOLS:
            raise ValueError(f"split must be one of {', '.join(map(repr, PROTOCOLS))}, got {split!r}.")
        if time_unit not in ("s", "ms"):
            raise ValueError(f"time_unit must be 's' or 'ms', got {time_unit!r}.")
        if k_core < 1:
            raise ValueError(f"k_core must be 1 or more, got {k_core}.")
        self.path = Path(path).expanduser()
        self.columns = (user_column, item_column, time_column)
        self.title_column = title_column
        self.time_unit = time_unit
        self.delimiter = delimiter
        self.split = split
        self.k_core = k_core

    @property
    def num_items(self) -> int:
        """Size of the catalogue; reads the file."""
        return len(self._log.numbered.items)

    @property
    def user_ids(self) -> list[Hashable]:
        """What users 1, 2, ... are called in the file."""
        return self._log.numbered.users

    @property
    def item_ids(self) -> list[Hashable]:
        """What items 1, 2, ... are called in the file."""
        return self._log.numbered.items

    def item_names(self) -> list[str]:
        """What items 1, 2, ... are called in the file."""
        return [str(item) for item in self.item_ids]

    def item_titles(self) -> list[str]:
        """The titles of items 1, 2, ... in the file, or what they are called there."""
        return [self._log.titles.get(item, str(item)) for item in self.item_ids]

    def user_names(self) -> list[str]:
        """The names of users 0, 1, ... in the file."""
        return [str(user) for user in self.user_ids]

    def item_fingerprint(self) -> str:
        """A hash of the names of the items in their order, which other rows may change."""
        return hashlib.sha256("\n".join(map(repr, self.item_ids)).encode()).hexdigest()

    def load_sequences(self) -> UserSequences:
        return self._log.numbered.sequences

    def make_protocol(self, sequences: UserSequences) -> EvaluationProtocol:
        return PROTOCOLS[self.split](sequences, self.max_length, self.samples)

    @cached_property
    def _log(self) -> _Log:
        """The file, read once.

        Raises:
            FileNotFoundError: if it is not there.
            ImportError: if it is Parquet and pyarrow is not installed.
            ValueError: if it lacks a column, a row is not as described, or a user has too few interactions to split.
        """
        events, titles = self._events()
        events = k_core(events, self.k_core)
        if not events:
            raise ValueError(f"{self.path} has no interactions" + (f" in its {self.k_core}-core." * (self.k_core > 1)))
        _warn_if_unsorted(self.path, events)
        numbered = number(events)
        lengths = numbered.sequences.offsets.diff()
        least = PROTOCOLS[self.split].shortest
        short = (lengths < least).nonzero().flatten().tolist()
        if short:
            raise ValueError(
                f"{self.path}: user {numbered.users[short[0]]!r} has {lengths[short[0]]} interactions, but "
                f"split={self.split!r} needs {least} ({len(short)} of {len(lengths)} users have fewer): drop such "
                f"users, or set k_core={least} or more."
            )
        return _Log(numbered, titles)

    def _events(self) -> tuple[list[Event], dict[Hashable, str]]:
        """All rows in the order of the file, and the titles of the items that have one."""
        if not self.path.exists():
            raise FileNotFoundError(f"path={str(self.path)!r} does not exist (looked for {self.path.absolute()}).")
        columns = self.columns if self.title_column is None else (*self.columns, self.title_column)
        parquet = self.path.suffix == ".parquet"
        rows = _parquet_rows(self.path, columns) if parquet else _text_rows(self.path, columns, self.delimiter)
        divisor = {"s": 1, "ms": 1000}[self.time_unit]
        events: list[Event] = []
        titles: dict[Hashable, str] = {}
        for where, user, item, time, *title in rows:
            for name, value in zip(self.columns, (user, item, time), strict=True):
                if value is None or value == "":
                    raise ValueError(f"{self.path}, {where} has no {name}: drop such rows.")
            try:
                seconds = _seconds(time, divisor)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{self.path}, {where}: {self.columns[2]} must be a number or an ISO date, got {time!r}."
                ) from None
            if abs(seconds) > LATEST:
                raise ValueError(
                    f"{self.path}, {where}: {self.columns[2]} {time!r} is far from our time in seconds since 1970: "
                    "give time_unit='ms' if it counts milliseconds."
                )
            events.append(Event(user, item, seconds))
            if title and title[0] not in (None, ""):
                titles.setdefault(item, str(title[0]))
        return events, titles


class _Log(NamedTuple):
    """What a file holds; ``titles`` by what items are called in it."""

    numbered: Numbered
    titles: dict[Hashable, str]


def _text_rows(path: Path, columns: tuple[str, ...], delimiter: str) -> Iterator[tuple[Any, ...]]:
    """Where each row stands, and its values in the columns."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        _check_columns(path, columns, list(rows.fieldnames or []))
        for row in rows:
            yield f"line {rows.line_num}", *(row[name] for name in columns)


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow, or convert the file to CSV.") from None
    file = pq.ParquetFile(path)
    _check_columns(path, columns, file.schema_arrow.names)
    row = 0
    for batch in file.iter_batches(columns=list(columns)):
        users, items, times, *titles = (batch.column(name) for name in columns)
        if pa.types.is_timestamp(times.type):
            # Python's datetime has no nanoseconds.
            times = times.cast(pa.timestamp("us", times.type.tz), safe=False)
        for values in zip(*(column.to_pylist() for column in (users, items, times, *titles)), strict=True):
            row += 1
            yield f"row {row}", *values


def _check_columns(path: Path, columns: tuple[str, ...], found: list[str]) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}, only {', '.join(found) or 'none at all'}: name yours by "
            "user_column, item_column, time_column and title_column."
        )


def _seconds(time: Any, divisor: int) -> int:
    """Unix seconds, rounded down, of a number, a date, or the text of either."""
    if isinstance(time, date):
        time = time.isoformat()
    if isinstance(time, str):
        try:
            time = float(time)
        except ValueError:
            moment = datetime.fromisoformat(time)
            return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    return math.floor(time / divisor)


def _warn_if_unsorted(path: Path, events: list[Event]) -> None:
    latest: dict[Hashable, int] = {}
    unsorted = set()
    for event in events:
        if event.time < latest.setdefault(event.user, event.time):
            unsorted.add(event.user)
        latest[event.user] = event.time
    if unsorted:
        rank_zero_warn(f"{path} is not in order of time for {len(unsorted)} of {len(latest)} users: sorted by time.")
