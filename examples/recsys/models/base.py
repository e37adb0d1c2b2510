"""Base classes of the recommenders: evaluation by the protocol, and training on the next item."""

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

    ``user`` is (B,) int64, from 0. ``items`` are (B, K) ids and ``scores`` (B, K); rows with fewer than K items end in
    id 0 and score -inf.
    """

    user: Tensor
    items: Tensor
    scores: Tensor


class Recommender(L.LightningModule):
    """A model that scores the whole catalogue for a history, evaluated by Recall@K and NDCG@K of the next item.

    Validation logs ``val/ndcg@10`` and the like. A test logs ``test/masked/...``, with the items of the history left
    out of the ranking, and ``test/unmasked/...``, with them in it. ``Trainer.predict`` returns
    :class:`Recommendations`.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        mask_history: whether validation and recommendations leave out the items of the history.

    Raises:
        ValueError: if ``num_items`` is below 2; if a loaded checkpoint has another number of items or another
            ``max_length``; if the fingerprint of the items in the data differs from that in training.
    """

    num_recommendations = 10
    """Number of items that ``Trainer.predict`` returns per user."""

    item_fingerprint: str | None = None
    """Identifies the numbering of the items in training; see :meth:`SequenceDataModule.item_fingerprint`."""

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
        """Score all items: (B, T) item ids, padded on the right -> (B, num_items); column j is item j + 1."""

    def score_batch(self, batch: Batch) -> Tensor:
        """Score all items, (B, num_items), from all history columns of a batch; by default from ``history`` alone."""
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
                f"The checkpoint was trained with max_length={found}, but the model has max_length={mine} from the "
                f"data: set max_length={found} in the data."
            )
        self.item_fingerprint = checkpoint.get("item_fingerprint")

    def _check_items(self) -> None:
        """Store the fingerprint of the items in training; otherwise compare it with the stored one."""
        data = getattr(self.trainer, "datamodule", None)
        found = data.item_fingerprint() if hasattr(data, "item_fingerprint") else None
        if self.item_fingerprint is None and self.trainer.training:
            self.item_fingerprint = found
        elif found is not None and self.item_fingerprint not in (None, found):
            raise ValueError(
                f"The model was trained on other items, or on items in another order, than {type(data).__name__} has: "
                "its scores would go to the wrong items. Give the data that it was trained on, or train again."
            )

    def _evaluate(self, metrics: MetricCollection, scores: Tensor, batch: Batch, masked: bool) -> None:
        # Column j is item j + 1, so the padding id 0 becomes the -1 that target_ranks skips.
        exclude = batch["seen"] - 1 if masked else None
        metrics.update(target_ranks(scores, batch["target"] - 1, exclude))
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name == "val/ndcg@10", batch_size=len(scores))


class NextItemRecommender(Recommender):
    """A recommender that encodes each position of a history to a state, trained to score the item that follows."""

    @abstractmethod
    def encode(self, history: Tensor) -> Tensor:
        """Encode the M positions that hold an item, row after row; no state depends on later positions.

        (B, T) item ids, padded on the right -> (M, d).
        """

    @abstractmethod
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight (num_items, d) and bias (num_items,) or None of the layer that scores items 1, 2, ..."""

    @abstractmethod
    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of states (M, d) for ``targets`` (M,), which are rows of the output layer."""

    def encode_batch(self, batch: Batch) -> Tensor:
        """States (M, d) as in :meth:`encode`, from all history columns of a batch."""
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
    # torchmetrics groups metrics with equal states, and all states are zero until the first hit.
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
