"""A LightningModule that does not use this package, and random data, to try ``lightning-muon``."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    """An embedding, two hidden layers and a head, without ``configure_optimizers``.

    Args:
        width: number of hidden features.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.EmbeddingBag(100, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.GELU())
        self.to_classes = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.to_classes(self.hidden(self.embedding(tokens)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        loss = nn.functional.cross_entropy(self(tokens), labels)
        self.log("loss", loss, prog_bar=True)
        return loss


class RandomTokens(L.LightningDataModule):
    """Sequences of eight tokens; the label is a function of the first token."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        tokens = torch.randint(100, (512, 8), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(tokens, tokens[:, 0] % 10), batch_size=32)
