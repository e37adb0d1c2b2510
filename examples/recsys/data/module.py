"""The LightningDataModule that all sources share."""

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

    Training batches hold ``history`` and ``targets``, both (B, T); those for validation and test ``history`` (B, T),
    ``target`` (B,) and ``seen`` (B, S); those for prediction every user once, with ``history`` and ``seen`` up to now.
    All are int64 item ids from 1, padded on the right with 0. ``user`` (B,) are the numbers of the users, int64 from 0.
    Where the source knows them, ``times`` (B, T) are the Unix seconds of ``history``, int64, padded with 0.

    A subclass says how many items there are (``num_items``), loads the sequences, and may choose another protocol,
    name items and users, and describe the items.

    Args:
        max_length: how many of the latest items of a history the model sees.
        mask_history: whether validation leaves the items of the history out of the ranking. A test reports both.
        samples: ``"sequence"``: a user is one training sample with a target at every position. ``"prefix"``: every
            target is a sample of its own.
        batch_size: training samples a batch and process.
        eval_batch_size: samples a batch and process in validation, test and prediction.
        num_workers: processes that load batches; the default loads them in the main process.
        group_by_length: whether the training samples of a batch are of about the same length. It saves padding where
            that costs time, as in TIGER, and makes batches less random.
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
        """Size of the catalogue, known before anything is loaded."""

    @abstractmethod
    def load_sequences(self) -> UserSequences:
        """Read what ``prepare_data`` left."""

    def make_protocol(self, sequences: UserSequences) -> EvaluationProtocol:
        """Split the sequences into training, validation and test."""
        return LeaveOneOut(sequences, self.max_length, self.samples)

    def item_names(self) -> list[str]:
        """What tells items 1, 2, ... apart outside: their numbers, unless the source has ids of its own."""
        return [str(item) for item in range(1, self.num_items + 1)]

    def item_titles(self) -> list[str]:
        """What to call items 1, 2, ... in print: their names, unless the source knows better."""
        return self.item_names()

    def item_descriptions(self) -> list[str]:
        """What else is known of items 1, 2, ... as plain text; "" where nothing is."""
        return [""] * self.num_items

    def item_fingerprint(self) -> str | None:
        """What tells one numbering of the items from another; None where the source never numbers them differently."""
        return None

    def user_names(self) -> list[str]:
        """What to call users 0, 1, ... in print: their numbers from 1, unless the source knows better."""
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
        """(num_items,) how often each item occurs in the training part."""
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
