"""Caser: convolutions over the latest items (Tang and Wang 2018, arXiv 1809.07426)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.recsys.checks import check_positive
from examples.recsys.data.sequences import PADDING
from examples.recsys.models.layers import check_length
from examples.recsys.models.untied import UntiedRecommender


class Caser(UntiedRecommender):
    """The form of the MuonRec study (arXiv 2603.00416): no user embedding, untied output, binary cross-entropy.

    The state at a position comes from the matrix E (window, d) of the embedded latest items, oldest first, with rows of
    zeros after them where there are fewer. A horizontal filter is as wide as E; it slides over the rows, and its
    largest answer counts. A vertical filter weighs the rows of E, and so has d answers. All answers pass a ReLU. In the
    study the filters are convolutions of an image with one channel; here they are the same maps with fewer dimensions.

    The study has ``samples: prefix`` with ``max_length: 10`` in the data. With ``samples: sequence`` and a longer
    ``max_length`` the windows are the same, and a batch holds those of whole users.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        max_length: longest history.
        hidden_size: width d of the embedding.
        heights: heights of the horizontal filters, in items.
        horizontal_filters: how many filters there are of each height.
        vertical_filters: how many filters weigh the rows.
        dropout: of the states.
        window: how many of the latest items a state sees.
        **kwargs: loss, masking, optimizers, schedule and rules of
            :class:`~examples.recsys.models.untied.UntiedRecommender`.

    Raises:
        ValueError: if a size is below 1, a filter does not fit into the window, or a history is longer than
            ``max_length``.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 10,
        hidden_size: int = 64,
        heights: Sequence[int] = (2, 3, 4),
        horizontal_filters: int = 16,
        vertical_filters: int = 1,
        dropout: float = 0.3,
        window: int = 10,
        **kwargs: Any,
    ) -> None:
        check_positive(horizontal_filters=horizontal_filters, vertical_filters=vertical_filters, window=window)
        if not heights or not 1 <= min(heights) <= max(heights) <= window:
            raise ValueError(f"heights must be one or more sizes from 1 to window={window}, got {list(heights)}.")
        super().__init__(num_items=num_items, max_length=max_length, hidden_size=hidden_size, **kwargs)
        self.save_hyperparameters()
        self.window = window
        self.horizontal = nn.ModuleList(nn.Conv1d(hidden_size, horizontal_filters, height) for height in heights)
        self.vertical = nn.Linear(window, vertical_filters)
        for filters in (*self.horizontal, self.vertical):
            # Glorot's scale for filters of an image with one channel.
            nn.init.normal_(filters.weight, std=(2 / (filters.weight[0].numel() + filters.weight.numel())) ** 0.5)
            nn.init.constant_(filters.bias, 0.1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(len(heights) * horizontal_filters + vertical_filters * hidden_size, num_items)

    def encode(self, history: Tensor) -> Tensor:
        check_length(history, self.max_length)
        columns = self.embedding(latest_items(history, self.window)).transpose(1, 2)
        largest = [filters(columns).relu().amax(2) for filters in self.horizontal]
        return self.dropout(torch.cat([*largest, self.vertical(columns).relu().flatten(1)], dim=1))


def latest_items(history: Tensor, window: int) -> Tensor:
    """What each position of a history sees of itself and the ``window - 1`` items before.

    (B, T) item ids, padded on the right -> (M, window) for the M positions that hold an item, row after row: ids oldest
    first, padded on the right.

    Example::

        >>> latest_items(torch.tensor([[3, 1, 4, 1], [5, 0, 0, 0]]), window=3)
        tensor([[3, 0, 0],
                [3, 1, 0],
                [3, 1, 4],
                [1, 4, 1],
                [5, 0, 0]])
    """
    rows, last = (history != PADDING).nonzero(as_tuple=True)
    columns = (last - window + 1).clamp(min=0)[:, None] + torch.arange(window, device=history.device)
    seen = columns <= last[:, None]
    return history[rows[:, None], columns.where(seen, 0)].where(seen, PADDING)
