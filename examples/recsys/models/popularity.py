"""The baseline that every recommender must beat: the most popular items, the same for all users."""

import torch
from torch import Tensor

from examples.recsys.models.base import Recommender


class Popularity(Recommender):
    """Scores an item by how often it occurs in the training data of the data module.

    There is nothing to fit: call ``Trainer.test``, ``Trainer.validate`` or ``Trainer.predict``. Equally popular items
    tie, which counts against the model.
    """

    item_counts: Tensor

    def __init__(self, num_items: int, mask_history: bool = True) -> None:
        super().__init__(num_items=num_items, mask_history=mask_history)
        self.save_hyperparameters()
        # Integers, which a Trainer's precision does not cast.
        self.register_buffer("item_counts", torch.zeros(num_items, dtype=torch.int64))

    def setup(self, stage: str) -> None:
        self.item_counts = self.trainer.datamodule.item_counts().to(self.item_counts)

    def forward(self, history: Tensor) -> Tensor:
        return self.item_counts.float().expand(len(history), -1)
