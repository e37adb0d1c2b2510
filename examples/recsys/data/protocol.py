"""The protocol by which every model here is trained and judged: leave one out, rank the whole catalogue.

A user's last item is the test target, the last but one the validation target, what is before them trains (the S3-Rec
and TIGER protocol, arXiv 2305.05065). The validation item belongs to the history of the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from examples.recsys.data.sequences import PADDING, UserSequences

Samples: TypeAlias = Literal["sequence", "prefix"]


class LeaveOneOut:
    """Training, validation and test samples of user sequences.

    Args:
        sequences: at least three items a user.
        max_length: how many of the latest items of a history the model sees.
        samples: ``"sequence"``: a user is one training sample with a target at every position. ``"prefix"``: every
            target is a sample of its own, with the at most ``max_length`` items before it.

    Raises:
        ValueError: if a user has fewer than three items, or an argument is not one of the above.
    """

    def __init__(self, sequences: UserSequences, max_length: int = 50, samples: Samples = "sequence") -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be 1 or more, got {max_length}.")
        if samples not in ("sequence", "prefix"):
            raise ValueError(f"samples must be 'sequence' or 'prefix', got {samples!r}.")
        short = (sequences.offsets.diff() < 3).nonzero()
        if len(short):
            user = int(short[0])
            raise ValueError(
                f"User {user + 1} has {len(sequences[user])} interactions, but leave-one-out needs 3: one to train on, "
                f"one to validate, one to test. Drop such users ({len(short)} of {len(sequences)})."
            )
        self.sequences = sequences
        self.max_length = max_length
        self.samples = samples

    def train(self) -> TrainingSamples:
        """Samples of ``history`` (T,) and ``targets`` (T,), the item that follows each position or padding."""
        begin, end = self.sequences.offsets[:-1], self.sequences.offsets[1:] - 2
        if self.samples == "sequence":
            begin, end = begin[end - begin > 1], end[end - begin > 1]
            return TrainingSamples(self.sequences.items, torch.maximum(begin, end - self.max_length - 1), end)
        lengths = end - begin - 1
        first = begin.repeat_interleave(lengths)
        ordinal = torch.arange(len(first)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        end = first + ordinal + 2
        begin = torch.maximum(first, end - self.max_length - 1)
        return TrainingSamples(self.sequences.items, begin, end, last_target_only=True)

    def validation(self) -> EvaluationSamples:
        """Samples of ``history`` (T,), ``target`` () and ``seen`` (S,), the whole history: one a user."""
        return EvaluationSamples(self.sequences, targets=self.sequences.offsets[1:] - 2, max_length=self.max_length)

    def test(self) -> EvaluationSamples:
        """As :meth:`validation`, one item later."""
        return EvaluationSamples(self.sequences, targets=self.sequences.offsets[1:] - 1, max_length=self.max_length)

    def item_counts(self) -> Tensor:
        """(num_items,) how often items 1, 2, ... occur in the training part."""
        held_out = torch.cat([self.sequences.offsets[1:] - 1, self.sequences.offsets[1:] - 2])
        trains = torch.ones(len(self.sequences.items), dtype=torch.bool).index_fill(0, held_out, False)
        return self.sequences.items[trains].bincount(minlength=self.sequences.num_items + 1)[1:]


class TrainingSamples(Dataset[dict[str, Tensor]]):
    """Windows ``items[begin:end]`` of a flat tensor, each read as a history and, one item later, its targets."""

    def __init__(self, items: Tensor, begin: Tensor, end: Tensor, last_target_only: bool = False) -> None:
        self.items = items
        self.windows = list(zip(begin.tolist(), end.tolist(), strict=True))
        self.last_target_only = last_target_only

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin, end = self.windows[index]
        targets = self.items[begin + 1 : end]
        if self.last_target_only:
            targets = torch.full_like(targets, PADDING).index_copy(0, torch.tensor([end - begin - 2]), targets[-1:])
        return {"history": self.items[begin : end - 1], "targets": targets}


class EvaluationSamples(Dataset[dict[str, Tensor]]):
    """One target a user, given by its position in ``sequences.items``, and what came before it."""

    def __init__(self, sequences: UserSequences, targets: Tensor, max_length: int) -> None:
        self.items = sequences.items
        self.windows = list(zip(sequences.offsets[:-1].tolist(), targets.tolist(), strict=True))
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin, target = self.windows[index]
        seen = self.items[begin:target]
        return {"history": seen[-self.max_length :], "target": self.items[target], "seen": seen}


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples; one-dimensional entries are padded on the right to the longest of the batch: (B,) or (B, T)."""
    return {
        key: torch.stack([sample[key] for sample in samples])
        if value.ndim == 0
        else pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=PADDING)
        for key, value in samples[0].items()
    }
