"""What GRU4Rec and Caser share: the item embedding, an output layer of its own, and the choice of the loss."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from examples.recsys.checks import check_positive
from examples.recsys.data.sequences import PADDING
from examples.recsys.models.base import NextItemRecommender
from examples.recsys.models.losses import binary_cross_entropy_loss, sampled_softmax_loss, softmax_loss
from lightning_muon import MuonMixin

LossName: TypeAlias = Literal["bce", "sampled_softmax", "softmax"]

_LOSSES = {"bce": binary_cross_entropy_loss, "sampled_softmax": sampled_softmax_loss, "softmax": softmax_loss}


class UntiedRecommender(MuonMixin, NextItemRecommender):
    """A recommender whose output layer is a linear map with bias, apart from the item embedding.

    A subclass makes states of ``self.embedding``, which has a row of zeros for the padding, and adds the layer
    ``self.head`` that takes them.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        max_length: longest history.
        hidden_size: width d of the item embedding, drawn from N(0, 0.01^2).
        loss: ``"bce"``: binary cross-entropy with negatives drawn for each target. ``"sampled_softmax"``: softmax over
            the target and negatives shared by the batch. ``"softmax"``: over all items.
        num_negatives: uniform negatives of the first two; None for 1 with ``"bce"`` and 1,024 with
            ``"sampled_softmax"``.
        mask_history: whether validation leaves the items of the history out of the ranking.
        **kwargs: optimizers, schedule and rules of :class:`lightning_muon.MuonMixin`.

    Raises:
        ValueError: if a size is below 1, the loss is unknown, or ``num_negatives`` does not go with it.
    """

    head: nn.Linear

    def __init__(
        self,
        num_items: int,
        max_length: int,
        hidden_size: int,
        loss: LossName = "bce",
        num_negatives: int | None = None,
        mask_history: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_items=num_items, mask_history=mask_history, **kwargs)
        check_positive(max_length=max_length, hidden_size=hidden_size)
        self.max_length = max_length
        self.embedding = nn.Embedding(num_items + 1, hidden_size, padding_idx=PADDING)
        nn.init.normal_(self.embedding.weight, std=0.01)
        with torch.no_grad():
            self.embedding.weight[PADDING].zero_()
        self.loss_function = _choose_loss(loss, num_negatives)

    def output_layer(self) -> tuple[Tensor, Tensor]:
        return self.head.weight, self.head.bias

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        return self.loss_function(states, targets, *self.output_layer())


def _choose_loss(name: LossName, num_negatives: int | None) -> Any:
    if name not in _LOSSES:
        raise ValueError(f"Unknown loss {name!r}: choose one of {', '.join(_LOSSES)}.")
    if num_negatives is None:
        return _LOSSES[name]
    if name == "softmax":
        raise ValueError(
            f"num_negatives={num_negatives} has no meaning with loss='softmax', which scores all items: leave it out, "
            "or choose 'sampled_softmax'."
        )
    check_positive(num_negatives=num_negatives)
    return partial(_LOSSES[name], num_negatives=num_negatives)
