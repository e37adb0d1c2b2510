"""A small module with every kind of parameter, and its data, for the tests under Lightning."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon import MuonMixin

NUM_ITEMS, LENGTH, BATCH = 23, 5, 4


class Layers(nn.Module):
    """Embedding, two hidden matrices, a norm and a head."""

    def __init__(self, num_items: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_items, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_items)

    def forward(self, items: Tensor) -> Tensor:
        hidden = self.embed(items)
        return self.head(self.norm(hidden + self.down(self.up(hidden).relu())))


class Bare(pl.LightningModule):
    """Predicts the target of each item; has no optimizer."""

    def __init__(self, num_items: int = NUM_ITEMS, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = Layers(num_items, width)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        items, targets = batch
        return nn.functional.cross_entropy(self.layers(items).flatten(0, 1), targets.flatten())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))


class Net(MuonMixin, Bare):
    """The same with the mixin."""

    def __init__(self, num_items: int = NUM_ITEMS, width: int = 8, **kwargs) -> None:
        super().__init__(num_items=num_items, width=width, **kwargs)
        self.save_hyperparameters()


class NeedsItems(MuonMixin, pl.LightningModule):
    """Needs the number of items, which the data module knows."""

    def __init__(self, num_items: int, width: int = 8, **kwargs) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.layers = Layers(num_items, width)

    training_step = Bare.training_step


class Unlinked(MuonMixin, pl.LightningModule):
    """Has a fixed number of items."""

    def __init__(self, width: int = 8, **kwargs) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.layers = Layers(NUM_ITEMS, width)

    training_step = Bare.training_step


class Silent(MuonMixin, pl.LightningModule):
    """Saves no hyperparameters."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.layers = Layers(NUM_ITEMS, 8)

    training_step = Bare.training_step


class WithOptimizer(Bare):
    """Brings its own SGD."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Items(pl.LightningDataModule):
    """The same batches in the same order in every epoch."""

    def __init__(self, batches: int = 5, catalogue: int = NUM_ITEMS) -> None:
        super().__init__()
        self.batches = batches
        self.num_items = catalogue

    def dataset(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(7)
        items = torch.randint(self.num_items, (self.batches * BATCH, LENGTH), generator=generator)
        return TensorDataset(items, (items * 3 + 1) % self.num_items)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=BATCH)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=BATCH)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=BATCH)


QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}


def trainer(**kwargs) -> pl.Trainer:
    """A silent Trainer on the CPU for 5 steps; keywords override its settings."""
    return pl.Trainer(**{**QUIET, "max_steps": 5, **kwargs})


def fit(module: pl.LightningModule, data: pl.LightningDataModule | None = None, **kwargs) -> pl.Trainer:
    """Fit, and return the Trainer."""
    fitted = trainer(**kwargs)
    fitted.fit(module, datamodule=data or Items())
    return fitted


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"differ: {different}"
