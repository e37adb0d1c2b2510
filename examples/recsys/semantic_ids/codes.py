"""Semantic ids: a short tuple of codes an item, from coarse to fine, read from and written to CSV."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.recsys.data.lines import read_lines
from examples.recsys.files import unfinished

LARGEST_CODE = 65_535
"""A codebook is meant to be smaller than a catalogue, and tables have its size."""


@dataclass(frozen=True)
class SemanticIds:
    """The codes of all items of a catalogue (arXiv 2305.05065).

    Args:
        codes: (num_items, levels) int64 from 0 to 65,535; row ``j`` is item ``j + 1``.

    Raises:
        ValueError: if ``codes`` has another shape or type, or a code is outside of 0..65,535.
    """

    codes: Tensor

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or not self.codes.numel() or self.codes.dtype != torch.long:
            raise ValueError(
                f"codes must be (num_items, levels) int64 with at least one of each, got {tuple(self.codes.shape)} "
                f"{self.codes.dtype}."
            )
        outside = (self.codes < 0) | (self.codes > LARGEST_CODE)
        if outside.any():
            item = int(outside.any(1).nonzero()[0]) + 1
            raise ValueError(
                f"Item {item} has the codes {self.codes[item - 1].tolist()}: codes must be from 0 to {LARGEST_CODE}."
            )

    @property
    def num_items(self) -> int:
        return len(self.codes)

    @property
    def levels(self) -> int:
        return self.codes.shape[1]

    @property
    def codebook_size(self) -> int:
        """How many codes a level has: one more than the largest of all levels, the same for every level."""
        return int(self.codes.max()) + 1

    def usage(self) -> list[float]:
        """The share of ``codebook_size`` that occurs, a level."""
        return [len(level.unique()) / self.codebook_size for level in self.codes.T]

    def collisions(self) -> int:
        """How many items share all their codes with another item."""
        _, index, counts = self.codes.unique(dim=0, return_inverse=True, return_counts=True)
        return int((counts[index] > 1).sum())

    @classmethod
    def read(cls, path: str | os.PathLike[str], num_items: int) -> SemanticIds:
        """Read ``item,c1,c2,...`` with a header from a CSV file, gzipped or not.

        The file counts the items of the catalogue from 0 or from 1, in any order.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming file and line, if a row is not made of whole numbers or an item comes twice; if items are
                missing or the file has others.
        """
        path = existing_file(path)
        rows = _read_rows(path)
        wanted = range(num_items) if 0 in rows else range(1, num_items + 1)
        missing = [item for item in wanted if item not in rows]
        if missing or len(rows) > num_items:
            others = f"lacks {len(missing)} of them, the first being {missing[0]}" if missing else "has others too"
            raise ValueError(
                f"{path} has the codes of {len(rows)} items, {min(rows)} to {max(rows)}. The catalogue has {num_items} "
                f"items, and the file {others}: take the codes of this catalogue, numbered from 0 or from 1."
            )
        try:
            return cls(torch.tensor([rows[item] for item in wanted]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write what :meth:`read` reads, items from 1; whole or not at all. Missing folders are made."""
        with unfinished(path) as unfinished_file, unfinished_file.open_text() as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["item", *(f"c{level}" for level in range(1, self.levels + 1))])
            writer.writerows([item, *codes] for item, codes in enumerate(self.codes.tolist(), start=1))


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path of codes that are there.

    Raises:
        FileNotFoundError: if they are not.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(
            f"There are no semantic ids at {found.absolute()}: make them with `python -m examples.recsys.semantic_ids "
            "fit -c configs/semantic_ids/rqvae.yaml -c configs/semantic_ids/features/....yaml`, or give the path of a "
            "file `item,c1,c2,...` as semantic_ids."
        )
    return found


def _read_rows(path: Path) -> dict[int, list[int]]:
    """The codes of each item, by its number in the file."""
    rows: dict[int, list[int]] = {}
    reader = csv.reader(read_lines(path))
    header = next(reader, [])
    if header[:1] != ["item"] or len(header) < 2:
        raise ValueError(f"{path} must start with the line item,c1,c2,..., got {','.join(header)[:60]!r}.")
    for row in filter(None, reader):
        where = f"{path}, line {reader.line_num}"
        try:
            item, *codes = map(int, row)
        except ValueError:
            codes = []
        if len(codes) != len(header) - 1:
            raise ValueError(f"{where}: expected {len(header)} whole numbers, got {','.join(row)[:60]!r}.")
        if item in rows:
            raise ValueError(f"{where}: item {item} comes twice.")
        rows[item] = codes
    if not rows:
        raise ValueError(f"{path} has no items.")
    return rows
