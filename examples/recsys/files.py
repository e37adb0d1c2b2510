"""Files that get their name when they are whole: an interrupted program leaves none that looks complete."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class UnfinishedFile:
    """A name beside that of a file, which what is written there gets by :meth:`finish`. Missing folders are made."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.part = self.path.with_name(f"{self.path.name}.unfinished")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def open_text(self) -> IO[Any]:
        """A text file to write, compressed where the name ends in ``.gz``."""
        opener: Any = gzip.open if self.path.suffix == ".gz" else open
        file: IO[Any] = opener(self.part, "wt", encoding="utf-8", newline="")
        return file

    def finish(self) -> None:
        self.part.replace(self.path)

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)


@contextmanager
def unfinished(path: str | os.PathLike[str]) -> Iterator[UnfinishedFile]:
    """Finishes the file at the end, or discards it after an error."""
    file = UnfinishedFile(path)
    try:
        yield file
    except BaseException:
        file.discard()
        raise
    file.finish()


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write a text file of lines, which have no line end of their own, whole or not at all."""
    with unfinished(path) as unfinished_file, unfinished_file.open_text() as file:
        file.writelines(f"{line}\n" for line in lines)
