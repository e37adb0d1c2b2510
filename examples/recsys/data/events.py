"""Conversion of a log of interactions to numbered sequences, for sources with ids of their own."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from typing import NamedTuple

from examples.recsys.data.sequences import UserSequences
from examples.recsys.data.times import Time


class Event(NamedTuple):
    """One interaction; ``time`` is in Unix seconds, with a fraction if the source has one."""

    user: Hashable
    item: Hashable
    time: Time


class Numbered(NamedTuple):
    """Sequences, and the original ids: item ``i`` is ``items[i - 1]`` in the source, and so for users."""

    sequences: UserSequences
    users: list[Hashable]
    items: list[Hashable]


def k_core(events: list[Event], k: int) -> list[Event]:
    """Keep the largest part in which each user and each item has ``k`` or more events, repeats included, in order."""
    while True:
        users = Counter(event.user for event in events)
        items = Counter(event.item for event in events)
        kept = [event for event in events if users[event.user] >= k and items[event.item] >= k]
        if len(kept) == len(events):
            return kept
        events = kept


def number(events: Iterable[Event]) -> Numbered:
    """Group events by user, oldest first, and number users and items from 1 in order of appearance.

    Users appear in the order of the events, items in the order of the sequences. Events of a user at exactly the same
    time keep their order. The times of the sequences are whole seconds, rounded down; if that loses a fraction, the
    sequences also have ranks.

    Raises:
        ValueError: if there are no events.
    """
    histories: dict[Hashable, list[Event]] = defaultdict(list)
    for event in events:
        histories[event.user].append(event)
    for history in histories.values():
        history.sort(key=lambda event: event.time)
    numbers: dict[Hashable, int] = {}
    items = [[numbers.setdefault(event.item, len(numbers) + 1) for event in history] for history in histories.values()]
    times = [[event.time for event in history] for history in histories.values()]
    seconds = [[math.floor(time) for time in clock] for clock in times]
    ranks = None
    if seconds != times:
        rank = {time: rank for rank, time in enumerate(sorted({time for clock in times for time in clock}))}
        ranks = [[rank[time] for time in clock] for clock in times]
    sequences = UserSequences.from_lists(items, num_items=len(numbers), times=seconds, ranks=ranks)
    return Numbered(sequences, list(histories), list(numbers))
