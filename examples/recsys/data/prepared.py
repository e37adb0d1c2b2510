"""Folders of prepared data: interactions as CSV with item and user numbers from 0, and the catalogue as JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.recsys.data.lines import read_lines
from examples.recsys.data.protocol import TEST, TRAIN, VALIDATION
from examples.recsys.data.sequences import UserSequences
from examples.recsys.files import write_lines

COLUMNS = ("user", "item", "timestamp")
LABELS = {"train": TRAIN, "valid": VALIDATION, "test": TEST}


class PreparedInteractions(NamedTuple):
    """Sequences, what their users are called in the file, and labels for :class:`TimeSplit` where it has splits."""

    sequences: UserSequences
    users: list[str]
    labels: Tensor | None


def read_interactions(path: Path, num_items: int) -> PreparedInteractions:
    """Read ``user,item,timestamp`` and, where there is such a column, ``split``, from a gzipped CSV with a header.

    The rows of a user stand together, oldest first. Numbers in the file count from 0; item 0 becomes item 1 here.

    Returns:
        The sequences, their users, and labels (interactions,); None for those if the file has no ``split``.

    Raises:
        ValueError: if a column is missing, a row is not as described, or an item is outside of the catalogue.
    """
    sequences: list[list[int]] = []
    times: list[list[int]] = []
    labels: list[int] = []
    users: dict[str, int] = {}
    rows = csv.DictReader(read_lines(path))
    columns = rows.fieldnames or []
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}, only {', '.join(columns) or 'none at all'}.")
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        try:
            item, time = int(row["item"]), int(row["timestamp"])
            label = LABELS[row["split"]] if "split" in columns else TRAIN
        except (TypeError, ValueError, KeyError):
            raise ValueError(
                f"{where}: expected whole numbers for item and timestamp, and one of {', '.join(LABELS)} for a "
                f"split, got {row}."
            ) from None
        if not 0 <= item < num_items:
            raise ValueError(
                f"{where}: item {item} is outside of 0..{num_items - 1}: the file is damaged or of another category."
            )
        if users.setdefault(row["user"], len(users)) != len(users) - 1:
            raise ValueError(f"{where}: user {row['user']} was left before: sort the rows by user, then time.")
        if len(sequences) < len(users):
            sequences.append([])
            times.append([])
        sequences[-1].append(item + 1)
        times[-1].append(time)
        labels.append(label)
    try:
        loaded = UserSequences.from_lists(sequences, num_items, times)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return PreparedInteractions(loaded, list(users), torch.tensor(labels) if "split" in columns else None)


def read_catalogue(folder: Path, num_items: int) -> list[dict[str, str]]:
    """What is known of items 1, 2, ... from ``items.jsonl.gz``, a dict with ``item`` (from 0) and ``title`` a line.

    Returns:
        A dict an item with its ``title`` and whatever else the line has, as text; without ``item``.

    Raises:
        FileNotFoundError: if the folder has no such file.
        ValueError: if it is not the catalogue of ``num_items`` items.
    """
    path = folder / "items.jsonl.gz"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no items.jsonl.gz, which names the items.")
    catalogue: dict[int, dict[str, str]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            entry = json.loads(line)
            item, _ = entry.pop("item"), entry["title"]
            catalogue[item] = {key: "" if value is None else str(value) for key, value in entry.items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}: no item and title in {line[:60]!r}.") from None
    if sorted(catalogue) != list(range(num_items)):
        raise ValueError(
            f"{path} has {len(catalogue)} items, but the set has 0..{num_items - 1}: it is of another set."
        )
    return [catalogue[item] for item in range(num_items)]


def write(folder: Path, sequences: UserSequences, catalogue: Iterable[dict[str, str]]) -> None:
    """Write what :func:`read_interactions`, without splits, and :func:`read_catalogue` read; whole or not at all.

    Args:
        folder: is made where it is not there.
        sequences: with times.
        catalogue: a dict with ``title`` for items 1, 2, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(
        folder / "items.jsonl.gz",
        (json.dumps({"item": number, **entry}, ensure_ascii=False) for number, entry in enumerate(catalogue)),
    )
    users = torch.arange(len(sequences)).repeat_interleave(sequences.offsets.diff())
    rows = zip(users.tolist(), (sequences.items - 1).tolist(), sequences.times.tolist(), strict=True)
    write_lines(folder / "interactions.csv.gz", [",".join(COLUMNS), *(f"{u},{i},{t}" for u, i, t in rows)])
