"""GRU4Rec: a gated recurrent unit over the items of a history (Hidasi et al. 2016, arXiv 1511.06939)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from examples.recsys.checks import check_positive
from examples.recsys.data.sequences import PADDING
from examples.recsys.models.layers import check_length
from examples.recsys.models.untied import UntiedRecommender


class GRU4Rec(UntiedRecommender):
    """The form of the MuonRec study (arXiv 2603.00416): embedding, GRU, untied output, binary cross-entropy.

    The state at a position is that of the last layer after its item. The study has one layer, no dropout, and
    ``samples: prefix`` with ``max_length: 10`` in the data.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        max_length: longest history.
        hidden_size: width d of embedding and states.
        num_layers: how many GRUs stand on one another.
        dropout: of what goes into each layer and into the output layer.
        **kwargs: loss, masking, optimizers, schedule and rules of
            :class:`~examples.recsys.models.untied.UntiedRecommender`.

    Raises:
        ValueError: if a size is below 1, or a history is longer than ``max_length``.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 64,
        num_layers: int = 1,
        dropout: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_items=num_items, max_length=max_length, hidden_size=hidden_size, **kwargs)
        self.save_hyperparameters()
        check_positive(num_layers=num_layers)
        self.dropout = nn.Dropout(dropout)
        between = dropout if num_layers > 1 else 0.0
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.head = nn.Linear(hidden_size, num_items)

    def encode(self, history: Tensor) -> Tensor:
        check_length(history, self.max_length)
        real = history != PADDING
        inputs = self.dropout(self.embedding(history))
        # Packing needs the lengths on the CPU, and spares the padding, which is most of a batch.
        packed = pack_padded_sequence(inputs, real.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=history.shape[1])
        return self.dropout(states[real])
