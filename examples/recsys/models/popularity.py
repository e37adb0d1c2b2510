"""The baseline that every recommender must beat: the most popular items, the same for all."""

from torch import Tensor

from examples.recsys.models.base import Recommender


class Popularity(Recommender):
    """Scores an item by how often it occurs in the training data, which it takes from the data module.

    There is nothing to fit: ``Trainer.test`` or ``Trainer.validate`` it. Items that are equally popular are ranked as
    the metrics rank all ties, against the model.
    """

    item_counts: Tensor

    def __init__(self, num_items: int, mask_history: bool = True) -> None:
        super().__init__(num_items=num_items, mask_history=mask_history)
        self.register_buffer("item_counts", None)

    def setup(self, stage: str) -> None:
        self.item_counts = self.trainer.datamodule.item_counts().to(self.device)

    def forward(self, history: Tensor) -> Tensor:
        return self.item_counts.expand(len(history), -1)
