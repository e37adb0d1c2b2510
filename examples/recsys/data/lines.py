"""Reading of text files by lines: plain or gzipped, in any encoding, with or without a byte-order mark."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # must come before UTF-16, whose mark is its prefix
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_lines(path: str | os.PathLike[str], encoding: str | None = None) -> Iterator[str]:
    r"""Yield the lines of a text file with their ends, without a byte-order mark; gzipped content is unpacked.

    Args:
        path: the file.
        encoding: encoding of the file. None is UTF-8; then errors do not advise to set another one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with the file and the fix, if it is not text, damaged, or in another encoding.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist (looked for {path.absolute()}).")
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder: give the path of a file in it.")
    try:
        with _open(path) as stream:
            start = stream.read(4)
            stream.seek(0)
            _check_start(path, start, encoding)
            # newline="" keeps the ends of lines, as the csv module needs.
            with io.TextIOWrapper(stream, encoding or "utf-8", newline="") as lines:
                for number, line in enumerate(lines):
                    if number == 0:
                        line = line.removeprefix("\ufeff")
                    yield line
    except UnicodeError:
        raise ValueError(_undecodable(path, encoding)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}): fetch or make it again.") from None


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if zipped else path.open("rb")


def _check_start(path: Path, start: bytes, encoding: str | None) -> None:
    """Raise ``ValueError`` if the first four bytes are not text in the encoding."""
    if start == b"PK\x03\x04":
        raise ValueError(f"{path} is a zip archive or a spreadsheet: unpack it, or save it as CSV.")
    name = codecs.lookup(encoding or "utf-8").name
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if marked and not name.startswith(marked):
        raise ValueError(f"{path} is marked as {marked.upper()}: {_remedy(encoding, marked)}.")
    if not marked and 0 in start and not name.startswith(("utf-16", "utf-32")):
        likely = f"utf-{16 if start.count(0) < 3 else 32}-{'le' if start[0] else 'be'}"
        raise ValueError(f"{path} has zero bytes, so it is {likely.upper()} or not text: {_remedy(encoding, likely)}.")


def _undecodable(path: Path, encoding: str | None) -> str:
    """Find the line and byte that cannot be decoded; the decoder knows only its place in a part of the file."""
    with _open(path) as stream:
        content = stream.read()
    try:
        content.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding or "utf-8", "replace").count("\n") + 1
        byte = content[error.start]
        place = f"line {line}: byte 0x{byte:02x} is not {(encoding or 'utf-8').upper()}"
    else:
        place = f"the text is not {(encoding or 'utf-8').upper()}"
    return f"{path}, {place}: {_remedy(encoding, 'latin-1', ' (old Western files, as MovieLens) or cp1252 (Windows)')}."


def _remedy(encoding: str | None, likely: str, why: str = "") -> str:
    return "save it as UTF-8" if encoding is None else f"set encoding={likely!r}{why}, or save it as UTF-8"
