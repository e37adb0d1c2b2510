"""Evaluation protocols: which interactions are held out, and what a sample is.

:class:`LeaveOneOut` holds out the last items of each user (the S3-Rec and TIGER protocol, arXiv 2305.05065).
:class:`TimeSplit` holds out the latest interactions of all users (the MiniOneRec and MuonRec protocol, arXiv
2510.24431). Both rank the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from examples.recsys.data.counts import counted
from examples.recsys.data.sequences import PADDING, UserSequences

Samples: TypeAlias = Literal["sequence", "prefix"]

TRAIN, VALIDATION, TEST = 0, 1, 2
"""Labels of interactions: the split in which an interaction is a target."""


class EvaluationProtocol:
    """Training, validation and test samples of user sequences, by one label per interaction.

    Every interaction except the first of a user is a target in the split of its label. The history of a target is all
    earlier interactions of the user.

    Args:
        sequences: the items of the users.
        labels: (interactions,) int64, ``TRAIN``, ``VALIDATION`` or ``TEST``, non-decreasing within a user. The label of
            a user's first interaction only decides whether :meth:`item_counts` counts it.
        max_length: number of latest items of a history that the model sees.
        samples: ``"sequence"``: each user is one training sample with a target at every position. ``"prefix"``: each
            target is a separate sample with up to ``max_length`` items before it.

    Raises:
        ValueError: if ``max_length`` is below 1 or ``samples`` is unknown.
    """

    shortest: ClassVar[int]
    """Smallest number of interactions of a user."""

    def __init__(
        self, sequences: UserSequences, labels: Tensor, max_length: int = 50, samples: Samples = "sequence"
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be 1 or more, got {max_length}.")
        if samples not in ("sequence", "prefix"):
            raise ValueError(f"samples must be 'sequence' or 'prefix', got {samples!r}.")
        self.sequences = sequences
        self.labels = labels
        self.max_length = max_length
        self.samples = samples

    def train(self) -> TrainingSamples:
        """Samples of ``history`` (T,), ``targets`` (T,), which are the next items or padding, and ``user`` ()."""
        targets = self.targets(TRAIN)
        if self.samples == "prefix":
            return TrainingSamples(self.sequences, targets, self.max_length, last_target_only=True)
        users = _users(self.sequences, targets)
        last = users.diff(append=users.new_tensor([-1])) != 0
        return TrainingSamples(self.sequences, targets[last], self.max_length)

    def validation(self) -> EvaluationSamples:
        """One sample per target: ``history`` (T,), ``seen`` (S,), the whole history, ``target`` () and ``user`` ()."""
        return EvaluationSamples(self.sequences, self.targets(VALIDATION), self.max_length)

    def test(self) -> EvaluationSamples:
        """Like :meth:`validation`, with the test targets."""
        return EvaluationSamples(self.sequences, self.targets(TEST), self.max_length)

    def prediction(self) -> HistorySamples:
        """One sample per user: ``history``, ``seen`` and ``user``, up to the last item and without a target."""
        users = torch.arange(len(self.sequences))
        return HistorySamples(self.sequences, users, self.sequences.offsets[1:], self.max_length)

    def targets(self, label: int) -> Tensor:
        """Positions in ``sequences.items`` of the targets of a split, user after user, oldest first."""
        return (self.labels == label).index_fill(0, self.sequences.offsets[:-1], False).nonzero().flatten()

    def item_counts(self) -> Tensor:
        """Number of occurrences of items 1, 2, ... in the training part, (num_items,)."""
        return self.sequences.items[self.labels == TRAIN].bincount(minlength=self.sequences.num_items + 1)[1:]


class LeaveOneOut(EvaluationProtocol):
    """The last item of a user is the test target, the second to last the validation target; the others train.

    The validation item belongs to the history of the test.

    Args:
        sequences: sequences with at least three items per user.
        max_length: number of latest items of a history that the model sees.
        samples: ``"sequence"``: each user is one training sample with a target at every position. ``"prefix"``: each
            target is a separate sample with up to ``max_length`` items before it.

    Raises:
        ValueError: if a user has fewer than three items, or as in :class:`EvaluationProtocol`.
    """

    shortest = 3

    def __init__(self, sequences: UserSequences, max_length: int = 50, samples: Samples = "sequence") -> None:
        _check_lengths(sequences, self.shortest, "leave-one-out needs 3: one to train on, one to validate, one to test")
        labels = torch.full_like(sequences.items, TRAIN)
        labels[sequences.offsets[1:] - 2] = VALIDATION
        labels[sequences.offsets[1:] - 1] = TEST
        super().__init__(sequences, labels, max_length, samples)


class TimeSplit(EvaluationProtocol):
    """All targets in order of time, split 8:1:1 by count into training, validation and test.

    Targets at the same time are in order of users, and those of a user in order of the sequence. A user may have any
    number of targets in each split. The history of a target is all earlier interactions of the user, including targets
    of the same and of earlier splits, as published. Items may repeat, so evaluation usually does not mask the history.

    A user's first interaction is not a target. It counts as training if the user's second one does.

    Args:
        sequences: sequences with times and at least two items per user.
        max_length: number of latest items of a history that the model sees.
        samples: as in :class:`LeaveOneOut`; a sequence ends with the user's last training target.
        labels: (interactions,) int64, the given split of each interaction; those of first interactions are ignored.
            None splits 8:1:1.

    Raises:
        ValueError: if there are no times, a user has a single item, a split is empty, the labels go back in time, or as
            in :class:`EvaluationProtocol`.
    """

    shortest = 2

    def __init__(
        self,
        sequences: UserSequences,
        max_length: int = 50,
        samples: Samples = "sequence",
        labels: Tensor | None = None,
    ) -> None:
        if sequences.times is None:
            raise ValueError("A split by time needs times, but these sequences have none: use LeaveOneOut.")
        _check_lengths(sequences, self.shortest, "a split by time needs 2: one to predict and one before it")
        first = sequences.offsets[:-1]
        targets = torch.ones_like(sequences.items, dtype=torch.bool).index_fill(0, first, False).nonzero().flatten()
        if labels is None:
            labels = _cut(targets[sequences.order[targets].argsort(stable=True)], len(sequences.items))
        else:
            _check_labels(labels, targets, sequences)
        sizes = labels[targets].bincount(minlength=3).tolist()
        if not all(sizes):
            raise ValueError(
                f"The split by time has {sizes[0]} training, {sizes[1]} validation and {sizes[2]} test targets, but "
                "needs some of each: 10 targets are enough without labels."
            )
        super().__init__(sequences, labels.index_copy(0, first, labels[first + 1]), max_length, samples)


class TrainingSamples(Dataset[dict[str, Tensor]]):
    """Windows of user sequences: a history, and as targets the same window one item later.

    Args:
        sequences: the items of the users.
        targets: (samples,) positions in ``sequences.items`` of the last target of each sample, none a user's first.
        max_length: largest number of positions of a sample.
        last_target_only: whether the other targets of a sample are padding.
    """

    def __init__(
        self, sequences: UserSequences, targets: Tensor, max_length: int, last_target_only: bool = False
    ) -> None:
        self.items = sequences.items
        self.times = sequences.times
        self.users = _users(sequences, targets)
        begin = torch.maximum(sequences.offsets[self.users], targets - max_length)
        self.windows = list(zip(begin.tolist(), targets.tolist(), strict=True))
        self.last_target_only = last_target_only

    def __len__(self) -> int:
        return len(self.windows)

    def lengths(self) -> list[int]:
        """Number of positions of each sample."""
        return [target - begin for begin, target in self.windows]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin, target = self.windows[index]
        targets = self.items[begin + 1 : target + 1]
        if self.last_target_only:
            targets = torch.full_like(targets, PADDING).index_copy(0, torch.tensor([target - begin - 1]), targets[-1:])
        sample = {"history": self.items[begin:target], "targets": targets, "user": self.users[index]}
        return sample if self.times is None else sample | {"times": self.times[begin:target]}


class HistorySamples(Dataset[dict[str, Tensor]]):
    """Histories of users up to given positions.

    Args:
        sequences: the items of the users.
        users: (samples,) numbers of users, from 0.
        ends: (samples,) positions in ``sequences.items``; a sample holds the items of the user before it.
        max_length: largest number of items of a history.
    """

    def __init__(self, sequences: UserSequences, users: Tensor, ends: Tensor, max_length: int) -> None:
        self.items = sequences.items
        self.times = sequences.times
        self.users = users
        self.windows = list(zip(sequences.offsets[users].tolist(), ends.tolist(), strict=True))
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin, end = self.windows[index]
        seen = self.items[begin:end]
        sample = {"history": seen[-self.max_length :], "seen": seen, "user": self.users[index]}
        return sample if self.times is None else sample | {"times": self.times[begin:end][-self.max_length :]}


class EvaluationSamples(HistorySamples):
    """Targets, given by their positions in ``sequences.items``, and their histories."""

    def __init__(self, sequences: UserSequences, targets: Tensor, max_length: int) -> None:
        super().__init__(sequences, _users(sequences, targets), targets, max_length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        _, target = self.windows[index]
        return super().__getitem__(index) | {"target": self.items[target]}


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples to (B,) or (B, T); one-dimensional entries are padded on the right to the longest of the batch."""
    return {
        key: torch.stack([sample[key] for sample in samples])
        if value.ndim == 0
        else pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=PADDING)
        for key, value in samples[0].items()
    }


def _check_lengths(sequences: UserSequences, least: int, needs: str) -> None:
    short = (sequences.offsets.diff() < least).nonzero()
    if len(short):
        user = int(short[0])
        raise ValueError(
            f"User {user + 1} has {counted(len(sequences[user]), 'interaction', 'interactions')}, but {needs}. Drop "
            f"such users ({len(short)} of {len(sequences)})."
        )


def _cut(targets: Tensor, interactions: int) -> Tensor:
    """Labels (interactions,) from targets in order of time; other interactions count as training."""
    labels = targets.new_full((interactions,), TRAIN)
    labels[targets[len(targets) * 8 // 10 :]] = VALIDATION
    labels[targets[len(targets) * 9 // 10 :]] = TEST
    return labels


def _check_labels(labels: Tensor, targets: Tensor, sequences: UserSequences) -> None:
    if labels.shape != sequences.items.shape or labels.dtype != torch.long:
        raise ValueError(
            f"labels must be ({len(sequences.items)},) int64, one per interaction, got {tuple(labels.shape)} "
            f"{labels.dtype}."
        )
    unknown = labels[(labels < TRAIN) | (labels > TEST)]
    if len(unknown):
        raise ValueError(
            f"labels must be {TRAIN} (train), {VALIDATION} (validation) or {TEST} (test), got {int(unknown[0])}."
        )
    # Check the order of time, where the last of a split may tie with the first of the next, and the order within users.
    times = sequences.times[targets]
    for label in (TRAIN, VALIDATION):
        earlier, later = times[labels[targets] <= label], times[labels[targets] > label]
        if len(earlier) and len(later) and earlier.max() > later.min():
            raise ValueError(
                f"labels go back in time: a target of split {label} or before is at {int(earlier.max())}, but one of a "
                f"later split is at {int(later.min())}. Label by time, or leave labels out to split 8:1:1."
            )
    users = _users(sequences, targets)
    falls = (labels[targets].diff() < 0) & (users.diff() == 0)
    if falls.any():
        raise ValueError(
            f"labels go back in the sequence of user {int(users[int(falls.nonzero()[0])]) + 1}, at equal times: "
            "after a held-out target there must be no training target."
        )


def _users(sequences: UserSequences, positions: Tensor) -> Tensor:
    """Numbers, from 0, of the users at the positions."""
    return torch.searchsorted(sequences.offsets, positions, right=True) - 1
