"""What every source of interactions is brought to: the items of each user, oldest first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from examples.recsys.data.counts import counted
from examples.recsys.data.lines import read_lines
from examples.recsys.files import write_lines

PADDING = 0
"""The item id that means "no item"; real ones start at 1."""


@dataclass(frozen=True)
class UserSequences:
    """The items of many users in one flat tensor.

    Args:
        items: (interactions,) int64 ids from 1 to ``num_items``, user after user, oldest first.
        offsets: (users + 1,) int64; user ``u`` owns ``items[offsets[u]:offsets[u + 1]]``.
        num_items: size of the catalogue.
        times: (interactions,) int64 Unix seconds, never falling within a user; None where the source has none.
        ranks: (interactions,) int64, places in the order of time over all users, the same for the same time, where the
            source knows times to less than a second; None where ``times`` have all that is known.

    Raises:
        ValueError: if there is no user, a user has no item, an id is outside of 1..num_items, or the times do not fit.
    """

    items: Tensor
    offsets: Tensor
    num_items: int
    times: Tensor | None = None
    ranks: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError("There are no users: the source of the sequences is empty.")
        empty = (self.offsets.diff() < 1).nonzero()
        if len(empty):
            raise ValueError(f"User {int(empty[0]) + 1} has no interactions: drop users without any.")
        outside = ((self.items < 1) | (self.items > self.num_items)).nonzero()
        if len(outside):
            position = int(outside[0])
            user = int(torch.searchsorted(self.offsets, position, right=True))
            raise ValueError(
                f"User {user} has the item id {int(self.items[position])}, but ids must be from 1 to "
                f"{self.num_items} (0 is the padding): number the items of the catalogue without gaps, from 1."
            )
        for name in ("times", "ranks"):
            if (clock := getattr(self, name)) is not None:
                _check_clock(name, clock, self.offsets)

    @property
    def order(self) -> Tensor | None:
        """(interactions,) what tells earlier from later over all users as finely as the source does; None without."""
        return self.times if self.ranks is None else self.ranks

    def ties(self) -> tuple[int, int]:
        """How many users have interactions at the same time as another of theirs, and how many interactions these are.

        Raises:
            ValueError: if there are no times.
        """
        if self.order is None:
            raise ValueError("These sequences have no times.")
        same = self.order.diff() == 0
        same[self.offsets[1:-1] - 1] = False  # from one user to the next
        tied = torch.zeros_like(self.items, dtype=torch.bool)
        tied[1:] |= same
        tied[:-1] |= same
        owners = torch.searchsorted(self.offsets, tied.nonzero().flatten(), right=True)
        return len(owners.unique()), len(owners)

    def tie_remark(self) -> str | None:
        """What :meth:`ties` found, as a sentence; None where there are none."""
        users, interactions = self.ties()
        if not users:
            return None
        have = counted(users, f"of {len(self)} users has", f"of {len(self)} users have")
        return (
            f"{have} rows at exactly the same time ({interactions} rows): these keep the order of the file, and which "
            "item is held out depends on it."
        )

    @classmethod
    def from_lists(
        cls,
        sequences: Sequence[Sequence[int]],
        num_items: int,
        times: Sequence[Sequence[int]] | None = None,
        ranks: Sequence[Sequence[int]] | None = None,
    ) -> UserSequences:
        """Build from one list of item ids a user, oldest first, and where they are known one of times and ranks."""

        def flat(name: str, lists: Sequence[Sequence[int]] | None) -> Tensor | None:
            if lists is None:
                return None
            if [len(values) for values in lists] != [len(sequence) for sequence in sequences]:
                raise ValueError(
                    f"{name} must have as many lists as there are users, each as long as the items of the user."
                )
            return torch.tensor([value for values in lists for value in values])

        items = torch.tensor([item for sequence in sequences for item in sequence], dtype=torch.long)
        offsets = torch.tensor([0, *accumulate(len(sequence) for sequence in sequences)])
        return cls(items, offsets, num_items, flat("times", times), flat("ranks", ranks))

    @classmethod
    def read(cls, path: str | os.PathLike[str], num_items: int) -> UserSequences:
        """Read ``user item item ...`` lines, whitespace separated, oldest item first; gzipped or not.

        Raises:
            ValueError: naming file and line, if a line is not made of integers or has no item; or as the class does.
        """
        sequences = []
        for number, line in enumerate(read_lines(path), start=1):
            try:
                user, *sequence = map(int, line.split())
            except ValueError:
                raise ValueError(
                    f"{path}, line {number}: expected 'user item item ...' as integers, got {line.rstrip()[:60]!r}."
                ) from None
            if not sequence:
                raise ValueError(f"{path}, line {number}: user {user} has no items: drop users without any.")
            sequences.append(sequence)
        return cls.from_lists(sequences, num_items)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the form that :meth:`read` reads, users numbered from 1, without times; whole or not at all."""
        write_lines(path, (f"{user} {' '.join(map(str, self[user - 1].tolist()))}" for user in range(1, len(self) + 1)))

    def __len__(self) -> int:
        """The number of users."""
        return len(self.offsets) - 1

    def __getitem__(self, user: int) -> Tensor:
        """The items of user ``user``, counted from 0, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]


def _check_clock(name: str, clock: Tensor, offsets: Tensor) -> None:
    if clock.shape != (int(offsets[-1]),) or clock.dtype != torch.long:
        raise ValueError(
            f"{name} must be ({int(offsets[-1])},) int64, one an interaction, got {tuple(clock.shape)} {clock.dtype}."
        )
    falls = clock.diff() < 0
    falls[offsets[1:-1] - 1] = False  # from one user to the next
    if falls.any():
        position = int(falls.nonzero()[0])
        user = int(torch.searchsorted(offsets, position, right=True))
        raise ValueError(
            f"User {user} has the {name.removesuffix('s')} {int(clock[position])} before {int(clock[position + 1])}: "
            "sort the interactions of each user by time."
        )
