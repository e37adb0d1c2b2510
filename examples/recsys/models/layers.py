"""Layers that sequence models share, and what they check."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.recsys.data.sequences import PADDING


def check_length(history: Tensor, max_length: int) -> None:
    """Raise ``ValueError`` if a history (B, T) is longer than ``max_length``."""
    if history.shape[1] > max_length:
        raise ValueError(
            f"The history has {history.shape[1]} items, but max_length={max_length}: keep the latest ones."
        )


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, in float32 where it has less: bfloat16 has a few hundred different scores, and ties count against us."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_not_empty(history: Tensor) -> None:
    """Raise ``ValueError`` that names the first row of a batch of histories (B, T) without an item."""
    empty = (history == PADDING).all(1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise ValueError(f"The history in row {row} of the batch has no item: there is nothing to predict from.")


# Most of a padded batch is padding. So the layers work on the M real positions alone, row after row, as (M, d), and
# only the attention unpacks them to (B, T).


class SequenceEmbedding(nn.Module):
    """Item embedding, times ``item_scale``, plus learned position embedding of the real positions, with dropout."""

    def __init__(
        self, num_items: int, max_length: int, hidden_size: int, dropout: float, item_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.item_scale = item_scale
        self.items = nn.Embedding(num_items + 1, hidden_size, padding_idx=PADDING)
        self.positions = nn.Embedding(max_length, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self, std: float, position_std: float | None = None) -> None:
        """Draw items from N(0, std^2), and positions likewise or with a width of their own; the padding stays zero."""
        nn.init.normal_(self.items.weight, std=std)
        nn.init.normal_(self.positions.weight, std=std if position_std is None else position_std)
        with torch.no_grad():
            self.items.weight[PADDING].zero_()

    def forward(self, history: Tensor) -> tuple[Tensor, RealPositions]:
        """(B, T) item ids, padded on the right -> (M, d), and where the M belong."""
        check_length(history, self.positions.num_embeddings)
        real = RealPositions(history)
        items = self.item_scale * self.items(history[real.index])
        return self.dropout(items + self.positions(real.index[1])), real


class RealPositions:
    """Where a batch of histories holds items, to go from (M, d) to (B, T, d) and back."""

    def __init__(self, history: Tensor) -> None:
        self.shape = history.shape
        self.index = (history != PADDING).nonzero(as_tuple=True)

    def unpack(self, x: Tensor) -> Tensor:
        """(M, d) -> (B, T, d), zero at the padding."""
        return x.new_zeros(*self.shape, x.shape[-1]).index_put(self.index, x)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (M, d)."""
        return x[self.index]
