"""Columns of a table in a text or Parquet file, row by row."""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.recsys.data.counts import counted
from examples.recsys.data.lines import read_lines


@dataclass(kw_only=True)
class TextFormat:
    r"""Format of a table in a text file, one row per line.

    Args:
        delimiter: separator of the columns: one character or several, as in ``::``; tab may be written ``\t``.
        columns: names of all columns in order, for a file without a header; None if the first line has the names.
        encoding: encoding of the text: ``utf-8``, ``latin-1``, ``utf-16``, ...
        quoted: whether values may be in double quotes, as in CSV, and then contain the delimiter and ends of lines.
            None: no if the delimiter is a tab or has several characters; otherwise yes, but a quoted value that seems
            to hold rows is refused.

    Raises:
        ValueError: if the encoding is unknown, or an argument is not as described.
    """

    delimiter: str = ","
    columns: Sequence[str] | None = None
    encoding: str = "utf-8"
    quoted: bool | None = None

    def __post_init__(self) -> None:
        self.delimiter = _unescaped(self.delimiter)
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(
                f"Python has no encoding={self.encoding!r}: set 'utf-8', 'latin-1', 'cp1252', 'utf-16' or another one "
                "that it knows."
            ) from None
        if self.quoted and len(self.delimiter) > 1:
            raise ValueError(f"quoted=True needs a delimiter of one character, got {self.delimiter!r}.")
        if self.columns is not None and (isinstance(self.columns, str) or len(set(self.columns)) < len(self.columns)):
            raise ValueError(f"columns must be a list of different names, one per column, got {self.columns!r}.")

    @property
    def reads_quotes(self) -> bool:
        """Whether double quotes are read as in CSV."""
        return self.delimiter != "\t" and len(self.delimiter) == 1 if self.quoted is None else self.quoted


class Table:
    """Some columns of a file.

    Args:
        path: a Parquet file (needs pyarrow), or else text; gzipped text is unpacked.
        columns: names of the columns by the arguments that give them, which errors mention. A name may leave out the
            type that RecBole appends: ``item_id`` is the column ``item_id:token``.
        format: format of a text file.
    """

    def __init__(self, path: Path, columns: Mapping[str, str], format: TextFormat) -> None:
        self.path = path
        self.columns = columns
        self.format = format
        self._counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield the place of each row and its values in the columns; a missing text value is None.

        Raises:
            FileNotFoundError: if there is no such file.
            ImportError: if it is Parquet and pyarrow is not installed.
            ValueError: with the file and the fix, if it lacks a column or is not as described.
        """
        self._counts.clear()
        return self._parquet_rows() if self.path.suffix == ".parquet" else self._text_rows()

    def remarks(self) -> list[str]:
        """Decisions about the values that were read, one sentence each."""
        counts = self._counts
        remarks = []
        if counts["wrapped"]:
            remarks.append(
                f"{counted(counts['wrapped'], 'value begins and ends', 'values begin and end')} with a quote, which "
                "was kept: quoted=True reads quotes as in CSV."
            )
        if counts["long"]:
            remarks.append(
                f"{counted(counts['long'], 'row spans', 'rows span')} several lines in quotes: quoted=False reads "
                "quotes as plain characters."
            )
        return remarks

    def _text_rows(self) -> Iterator[tuple[Any, ...]]:
        lines = _Lines(read_lines(self.path, self.format.encoding))
        rows = self._quoted_rows(lines) if self.format.reads_quotes else self._plain_rows(lines)
        names = self.format.columns
        if names is None:
            _, names = next(rows, ("", []))
        positions = self._positions(list(names))
        for where, row in rows:
            if len(row) > len(names) and any(row[len(names) :]):
                raise ValueError(self._too_wide(where, row, len(names)))
            if self.format.columns is not None and len(row) < len(names):
                raise ValueError(
                    f"{self.path}, {where} has {counted(len(row), 'column', 'columns')}, but columns={list(names)} "
                    f"has {len(names)} with delimiter={self.format.delimiter!r}: {row[0][:60]!r}."
                )
            values = [row[position] if position < len(row) else None for position in positions]
            if not self.format.reads_quotes:
                self._counts["wrapped"] += sum(
                    len(value) > 1 and value[0] == value[-1] == '"' for value in values if value
                )
            yield where, *values

    def _plain_rows(self, lines: _Lines) -> Iterator[tuple[str, list[str]]]:
        for line in lines:
            if line := line.rstrip("\r\n"):
                yield f"line {lines.number}", line.split(self.format.delimiter)

    def _quoted_rows(self, lines: _Lines) -> Iterator[tuple[str, list[str]]]:
        rows = csv.reader(lines, delimiter=self.format.delimiter, strict=True)
        width = len(self.format.columns or ())
        while True:
            lines.forget()
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise ValueError(
                    f"{self.path}, {lines.place()}: a quote is not closed as in CSV ({error}). Set quoted=False if "
                    "quotes are plain characters."
                ) from None
            if row is None:
                return
            width = width or len(row)
            if len(lines.seen) > 1 and row:
                self._counts["long"] += 1
                swallowed = any(line.count(self.format.delimiter) + 1 >= width for line in lines.seen[1:])
                if self.format.quoted is None and swallowed:
                    raise ValueError(
                        f"{self.path}, {lines.place()}: a quote is closed in another row. Set quoted=False if quotes "
                        "are plain characters, or quoted=True if these lines are one row."
                    )
            if row:
                yield lines.place(), row

    def _positions(self, found: list[str]) -> list[int]:
        untyped = [_TYPE.sub("", name) for name in found]
        positions = []
        for name in self.columns.values():
            names = found if name in found else untyped
            if names.count(name) > 1:
                raise ValueError(f"{self.path} has {names.count(name)} columns {name}: rename all but one.")
            positions.append(names.index(name) if name in names else -1)
        missing = [name for name, position in zip(self.columns.values(), positions, strict=True) if position < 0]
        if missing:
            raise ValueError(
                f"{self.path} has no column {', '.join(missing)}, only {', '.join(found)[:200] or 'none at all'}: "
                f"{self._remedy(found, missing)}."
            )
        return positions

    def _remedy(self, found: list[str], missing: list[str]) -> str:
        """The fix for missing columns."""
        if self.format.columns is not None:
            return f"{_listed(self.columns)} must be names in columns"
        if len(found) == 1:
            other = next((mark for mark in ("\t", "::", ";", "|", ",") if mark in found[0]), None)
            if other is not None and other != self.format.delimiter:
                return f"its columns look separated by {other!r}: set delimiter={other!r}"
        if spaced := [name for name in found if name != name.strip() and _TYPE.sub("", name.strip()) in missing]:
            return self._without_spaces(spaced)
        if any(name.startswith('"') for name in found):
            return "its names are in quotes: set quoted=True"
        if any(re.fullmatch(r"[\d.]+|", name) for name in found):
            return "if the first line is a row, give the names of all columns as columns=[...]"
        return f"set {_listed(self.columns)} to the names in the file"

    def _without_spaces(self, names: list[str]) -> str:
        """The fix for names that are right except for spaces around them."""
        if self.path.suffix != ".parquet" and all(name == f" {name.strip()}" for name in names):
            return (
                f"its names {', '.join(map(repr, names))} begin with a space: remove the spaces from the file, or set "
                f"delimiter={self.format.delimiter + ' '!r} if one follows each delimiter in all lines and nothing is "
                "in quotes"
            )
        return f"its names {', '.join(map(repr, names))} begin or end with spaces: remove them from the file"

    def _too_wide(self, where: str, row: list[str], width: int) -> str:
        remedy = (
            "put values that hold the delimiter in quotes"
            if self.format.reads_quotes
            else "no value may hold the delimiter, unless it is in quotes and quoted=True is set"
        )
        return (
            f"{self.path}, {where} has {len(row)} columns, but there are names for {width} only, with "
            f"delimiter={self.format.delimiter!r}: {remedy}."
        )

    def _parquet_rows(self) -> Iterator[tuple[Any, ...]]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ImportError(f"{self.path} needs pyarrow: pip install pyarrow, or convert the file to CSV.") from None
        if not self.path.exists():
            raise FileNotFoundError(f"path={str(self.path)!r} does not exist (looked for {self.path.absolute()}).")
        try:
            file = pq.ParquetFile(self.path)
        except pa.ArrowInvalid:
            raise ValueError(f"{self.path} is not a Parquet file or is damaged: make it again.") from None
        found = file.schema_arrow.names
        names = [found[position] for position in self._positions(found)]
        row = 0
        for batch in file.iter_batches(columns=names):
            columns = [_python_values(batch.column(name)) for name in names]
            for values in zip(*columns, strict=True):
                row += 1
                yield f"row {row}", *values


class _Lines(Iterator[str]):
    """An iterator over lines that stores those of the latest row."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.number = 0
        self.seen: list[str] = []

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.seen.append(line)
        return line

    def forget(self) -> None:
        self.seen.clear()

    def place(self) -> str:
        first = self.number - len(self.seen) + 1
        return f"line {first}" if first == self.number else f"lines {first} to {self.number}"


_TYPE = re.compile(r":(?:token|token_seq|float|float_seq)$")


def _unescaped(delimiter: str) -> str:
    r"""Decode ``\t`` and other escapes in a delimiter."""
    meant = delimiter
    if re.fullmatch(r"(\\(t|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}))+", delimiter):
        meant = codecs.decode(delimiter, "unicode_escape")
    elif "\\" in delimiter and len(delimiter) > 1:
        raise ValueError(f"delimiter={delimiter!r} looks like a pattern: give the text between the columns itself.")
    if not meant or any(character in '"\r\n' for character in meant):
        raise ValueError(f"delimiter must be one or more characters, no quote and no end of line, got {delimiter!r}.")
    return meant


def _listed(names: Mapping[str, str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _python_values(column: Any) -> list[Any]:
    """Values of a column. Times become ISO dates with all digits, since Python's datetime has no nanoseconds."""
    import pyarrow as pa

    return list((column.cast(pa.string()) if pa.types.is_timestamp(column.type) else column).to_pylist())
