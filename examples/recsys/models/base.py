"""What all recommenders share: evaluation by the protocol, and training on the next item."""

from abc import abstractmethod
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection

from examples.recsys.data.sequences import PADDING
from examples.recsys.metrics import NDCG, Recall, target_ranks
from examples.recsys.models.layers import at_least_float32, check_not_empty

Batch = dict[str, Tensor]

TOP_K = (5, 10)


class Recommendations(NamedTuple):
    """The best items for the users of a batch, best first.

    ``user`` (B,) int64 from 0; ``items`` (B, K) ids, 0 where there are fewer than K; ``scores`` (B, K), -inf there.
    """

    user: Tensor
    items: Tensor
    scores: Tensor


class Recommender(L.LightningModule):
    """A model that scores the whole catalogue for a history, judged by Recall@K and NDCG@K of the next item.

    Logs ``val/ndcg@10`` and the like, and in a test ``test/masked/...`` (items of the history are left out of the
    ranking) and ``test/unmasked/...`` (they compete). ``Trainer.predict`` gives :class:`Recommendations`.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        mask_history: whether validation and recommendations leave the items of the history out.

    Raises:
        ValueError: if ``num_items`` is below 2; if a checkpoint is of a catalogue of another size, or the data number
            the items in another way than those of the training, where they tell; or if ``max_length`` differs.
    """

    num_recommendations = 10
    """How many items ``Trainer.predict`` gives a user."""

    item_fingerprint: str | None = None
    """What tells the numbering of the items in training; see :meth:`SequenceDataModule.item_fingerprint`."""

    def __init__(self, num_items: int, mask_history: bool = True) -> None:
        super().__init__()
        if num_items < 2:
            raise ValueError(f"num_items must be 2 or more, got {num_items}: there is nothing to rank.")
        self.num_items = num_items
        self.mask_history = mask_history
        self.val_metrics = _ranking_metrics("val/")
        self.test_masked = _ranking_metrics("test/masked/")
        self.test_unmasked = _ranking_metrics("test/unmasked/")

    @abstractmethod
    def forward(self, history: Tensor) -> Tensor:
        """Scores of all items: (B, T) item ids, padded on the right -> (B, num_items); column j is item j + 1."""

    def score_batch(self, batch: Batch) -> Tensor:
        """Scores (B, num_items) from all that a batch tells of the histories; by default from the items alone."""
        return self(batch["history"])

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self._evaluate(self.val_metrics, self.score_batch(batch), batch, masked=self.mask_history)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        scores = self.score_batch(batch)
        self._evaluate(self.test_masked, scores, batch, masked=True)
        self._evaluate(self.test_unmasked, scores, batch, masked=False)

    def predict_step(self, batch: Batch, batch_index: int) -> Recommendations:
        scores = self.score_batch(batch).float()
        scores = F.pad(scores.masked_fill(scores.isnan(), -torch.inf), (1, 0), value=-torch.inf)  # column 0 is padding
        if self.mask_history:
            scores = scores.scatter(1, batch["seen"], -torch.inf)
        best, items = scores.topk(min(self.num_recommendations, self.num_items))
        return Recommendations(batch["user"], items.masked_fill(best == -torch.inf, PADDING), best)

    def on_fit_start(self) -> None:
        self._check_items()

    def on_validation_start(self) -> None:
        self._check_items()

    def on_test_start(self) -> None:
        self._check_items()

    def on_predict_start(self) -> None:
        self._check_items()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_items"] = self.num_items
        checkpoint["item_fingerprint"] = self.item_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        trained = checkpoint.get("hyper_parameters", {})
        found = checkpoint.get("num_items", trained.get("num_items", self.num_items))
        if found != self.num_items:
            raise ValueError(
                f"The checkpoint is of a catalogue of {found} items, but the data have {self.num_items}: give the data "
                "that it was trained on, or a checkpoint of this catalogue."
            )
        found, mine = trained.get("max_length"), self.hparams.get("max_length")
        if found != mine and None not in (found, mine):
            raise ValueError(
                f"The checkpoint was trained with max_length={found}, but the model has max_length={mine}, which it "
                f"takes from the data: give the data max_length={found}."
            )
        self.item_fingerprint = checkpoint.get("item_fingerprint")

    def _check_items(self) -> None:
        """Remember what tells the numbering of the items, or compare it with that of the training."""
        data = getattr(self.trainer, "datamodule", None)
        found = data.item_fingerprint() if hasattr(data, "item_fingerprint") else None
        if self.item_fingerprint is None and self.trainer.training:
            self.item_fingerprint = found
        elif found is not None and self.item_fingerprint not in (None, found):
            raise ValueError(
                f"The model was trained on other items, or on items in another order, than {type(data).__name__} has: "
                "its scores would go to the wrong ones. Give the data that it was trained on, or train anew."
            )

    def _evaluate(self, metrics: MetricCollection, scores: Tensor, batch: Batch, masked: bool) -> None:
        # Column j is item j + 1, so the padding id 0 becomes the -1 that target_ranks skips.
        exclude = batch["seen"] - 1 if masked else None
        metrics.update(target_ranks(scores, batch["target"] - 1, exclude))
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name == "val/ndcg@10", batch_size=len(scores))


class NextItemRecommender(Recommender):
    """A recommender that encodes a history to a state a position, trained to score the item that follows each."""

    @abstractmethod
    def encode(self, history: Tensor) -> Tensor:
        """States of the M positions that hold an item, row after row, each of them blind to what comes later.

        (B, T) item ids, padded on the right -> (M, d).
        """

    @abstractmethod
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight (num_items, d) and bias (num_items,) or None that score items 1, 2, ... for a state."""

    @abstractmethod
    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of states (M, d) that should score the rows ``targets`` (M,) of the output layer."""

    def encode_batch(self, batch: Batch) -> Tensor:
        """States (M, d) as :meth:`encode` has them, from all that a batch tells of the histories."""
        return self.encode(batch["history"])

    def forward(self, history: Tensor) -> Tensor:
        return self.score_batch({"history": history})

    def score_batch(self, batch: Batch) -> Tensor:
        check_not_empty(batch["history"])
        last = (batch["history"] != PADDING).sum(1).cumsum(0) - 1
        states = self.encode_batch(batch)[last]
        weight, bias = self.output_layer()
        with torch.autocast(states.device.type, enabled=False):
            scores = at_least_float32(states) @ at_least_float32(weight).T
            return scores if bias is None else scores + at_least_float32(bias)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        history = batch["history"]
        targets = batch["targets"][history != PADDING]
        counts = targets != PADDING
        loss = self.loss(self.encode_batch(batch)[counts], targets[counts] - 1)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(history))
        return loss


def _ranking_metrics(prefix: str) -> MetricCollection:
    metrics = {f"{name}@{k}": metric(k) for name, metric in (("ndcg", NDCG), ("recall", Recall)) for k in TOP_K}
    # Compute groups are guessed from equal states, and all are zero as long as nothing hits.
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
