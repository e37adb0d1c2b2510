"""Preprocessing of the raw Amazon 2018 reviews and metadata to the data sets of MiniOneRec (arXiv 2510.24431)."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Any

from examples.recsys.data.amazon2014 import iterate_reviews
from examples.recsys.data.events import Event, k_core, number
from examples.recsys.data.lines import read_lines
from examples.recsys.data.sequences import UserSequences

CORE = 5
MAX_TITLE_WORDS = 20


def months(first: tuple[int, int], last: tuple[int, int]) -> range:
    """Unix seconds from the first day of one (year, month) to that of another, in UTC, both included."""
    start, end = (int(datetime(year, month, 1, tzinfo=UTC).timestamp()) for year, month in (first, last))
    return range(start, end + 1)


def preprocess(
    reviews: str | os.PathLike[str], metadata: str | os.PathLike[str], window: range
) -> tuple[UserSequences, list[dict[str, str]]]:
    """Make sequences with times, and a dict per item: ``asin``, ``title``, ``brand``, ``categories``, ``description``.

    Reviews outside the window and of items without a usable title are dropped. Then users and items with fewer than 5
    reviews are dropped, repeatedly until none is left. A user may review an item repeatedly. Users are numbered in
    order of the file, items in order of the sequences; reviews of the same day keep the order of the file.

    The metadata are read line by line, and only items with reviews are kept.

    Args:
        reviews: gzip file of JSON lines with ``reviewerID``, ``asin`` and ``unixReviewTime``.
        metadata: gzip file of JSON lines with ``asin``, and ``title`` and more if known.
        window: Unix seconds of the reviews to keep.

    Raises:
        ValueError: with the number of the line, if it is not as described; if no review is left.
    """
    events = [
        Event(review["reviewerID"], review["asin"], time)
        for review in iterate_reviews(reviews)
        if (time := int(review["unixReviewTime"])) in window
    ]
    catalogue = read_metadata(metadata, {event.item for event in events})
    events = k_core([event for event in events if event.item in catalogue], CORE)
    if not events:
        raise ValueError(
            f"{reviews} and {metadata} leave no {CORE}-core of titled items: check that they are complete and of the "
            "same category."
        )
    sequences, _, items = number(events)
    return sequences, [catalogue[asin] for asin in items]


def read_metadata(path: str | os.PathLike[str], wanted: Collection[str]) -> dict[str, dict[str, str]]:
    """Read the catalogue entries, by ASIN, of the ``wanted`` items with a usable title; of two entries the later one.

    Raises:
        ValueError: with the number of the line, if it is not a JSON dict with ``asin``.
    """
    catalogue = {}
    for entry in _entries(path):
        asin = entry["asin"]
        if asin in wanted and (title := _title(entry)):
            catalogue[asin] = {
                "asin": asin,
                "title": title,
                "brand": _text(entry.get("brand")),
                "categories": _text(entry.get("category"), ", "),
                "description": _text(entry.get("description")),
            }
    return catalogue


def _entries(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    for line_number, line in enumerate(read_lines(path), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict) or "asin" not in entry:
            raise ValueError(f"{path}, line {line_number}: not metadata with an asin: {line[:60]!r}.")
        yield entry


def _title(entry: dict[str, Any]) -> str | None:
    """The title without surrounding quotes; None if it is missing, a piece of a web page, or too long."""
    raw = entry.get("title") or ""
    if "<span id" in raw:
        return None
    title: str = raw.replace("&quot;", '"').replace("&amp;", "&").strip(" ").strip('"')
    return title if len(title) > 1 and len(title.split(" ")) <= MAX_TITLE_WORDS else None


def _text(value: str | list[str] | None, separator: str = " ") -> str:
    return value if isinstance(value, str) else separator.join(value or [])
