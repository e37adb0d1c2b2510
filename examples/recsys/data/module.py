"""Base class of the data modules."""

from abc import abstractmethod
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.recsys.data.protocol import EvaluationProtocol, LeaveOneOut, Samples, collate
from examples.recsys.data.sampling import LengthGroupedSampler, evaluation_sampler
from examples.recsys.data.sequences import UserSequences


class SequenceDataModule(L.LightningDataModule):
    """Batches of user sequences under one protocol, by default leave-one-out.

    Training batches hold ``history`` and ``targets``, both (B, T). Validation and test batches hold ``history`` (B, T),
    ``target`` (B,) and ``seen`` (B, S), which is the whole history. Prediction batches hold each user once, with
    ``history`` and ``seen`` up to the last item. All are int64 item ids from 1, padded on the right with 0. ``user``
    (B,) are the numbers of the users, int64 from 0. If the source has times, ``times`` (B, T) are the Unix seconds of
    ``history``, int64, padded with 0.

    A subclass defines ``num_items`` and loads the sequences. It may choose another protocol, name items and users, and
    describe the items.

    Args:
        max_length: number of latest items of a history that the model sees.
        mask_history: whether validation leaves the items of the history out of the ranking. A test reports both.
        samples: ``"sequence"``: each user is one training sample with a target at every position. ``"prefix"``: each
            target is a separate sample.
        batch_size: training samples per batch and process.
        eval_batch_size: samples per batch and process in validation, test and prediction.
        num_workers: number of processes that load batches; 0 loads them in the main process.
        group_by_length: whether the training samples of a batch have about the same length. This saves padding, which
            costs time in TIGER, and makes batches less random.
    """

    def __init__(
        self,
        max_length: int = 50,
        mask_history: bool = True,
        samples: Samples = "sequence",
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        group_by_length: bool = False,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.mask_history = mask_history
        self.samples: Samples = samples
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.group_by_length = group_by_length
        self.protocol: EvaluationProtocol | None = None

    @property
    @abstractmethod
    def num_items(self) -> int:
        """Size of the catalogue, known before the sequences are loaded."""

    @abstractmethod
    def load_sequences(self) -> UserSequences:
        """Load the sequences, after ``prepare_data``."""

    def make_protocol(self, sequences: UserSequences) -> EvaluationProtocol:
        """Split the sequences into training, validation and test."""
        return LeaveOneOut(sequences, self.max_length, self.samples)

    def item_names(self) -> list[str]:
        """Ids of items 1, 2, ... in the source; their numbers if the source has none."""
        return [str(item) for item in range(1, self.num_items + 1)]

    def item_titles(self) -> list[str]:
        """Titles of items 1, 2, ... for printing; their names if the source has none."""
        return self.item_names()

    def item_descriptions(self) -> list[str]:
        """Descriptions of items 1, 2, ... as plain text, "" if there is none."""
        return [""] * self.num_items

    def item_fingerprint(self) -> str | None:
        """Identifies the numbering of the items; None if the source always numbers them the same way."""
        return None

    def user_names(self) -> list[str]:
        """Names of users 0, 1, ... for printing; their numbers from 1 if the source has none."""
        return [str(user) for user in range(1, len(self._split().sequences) + 1)]

    def setup(self, stage: str) -> None:
        if self.protocol is None:
            self.protocol = self.make_protocol(self.load_sequences())

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        samples = self._split().train()
        if not self.group_by_length:
            return self._loader(samples, batch_size=self.batch_size, shuffle=True)
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = LengthGroupedSampler(samples.lengths(), self.batch_size, processes, rank)
        return self._loader(samples, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._evaluation_loader(self._split().validation())

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._evaluation_loader(self._split().test())

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._evaluation_loader(self._split().prediction())

    def item_counts(self) -> Tensor:
        """Number of occurrences of each item in the training part, (num_items,)."""
        return self._split().item_counts()

    def _split(self) -> EvaluationProtocol:
        if self.protocol is None:
            raise RuntimeError(f"{type(self).__name__} is not set up: call prepare_data() and setup('fit') first.")
        return self.protocol

    def _evaluation_loader(self, dataset: Dataset[dict[str, Tensor]]) -> DataLoader[dict[str, Tensor]]:
        sampler = evaluation_sampler(dataset, self.trainer)
        return self._loader(dataset, batch_size=self.eval_batch_size, sampler=sampler)

    def _loader(self, dataset: Dataset[dict[str, Tensor]], **kwargs: Any) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(
            dataset,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **kwargs,
        )
