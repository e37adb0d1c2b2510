"""Checkpoints of real runs, a wide terminal, and figures only where a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import rich
import torch

from lightning_muon import Muon
from lightning_muon.diagnostics.spectra import command
from tests.diagnostics.spectra.fused import Fused
from tests.lightning_helpers import Bare, Net, fit


class Baseline(Bare):
    """Without the mixin, trained with AdamW."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture(autouse=True)
def wide_terminal() -> Iterator[None]:
    """Long lines are not wrapped."""
    rich.reconfigure(width=200)
    yield
    rich.reconfigure()


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all the rest."""
    monkeypatch.setattr(command, "figures_available", lambda: False)


@pytest.fixture
def figures(no_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures all the same."""
    monkeypatch.setattr(command, "figures_available", lambda: True)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net2.ckpt, net7.ckpt and net12.ckpt of one run, and with baseline.ckpt and fused.ckpt."""
    folder = tmp_path_factory.mktemp("runs")
    pl.seed_everything(0)
    fit(
        Net(matrix_optimizer=partial(Muon, lr=0.05)),
        max_steps=12,
        max_epochs=-1,
        callbacks=[_SaveAt(folder, (2, 7, 12))],
    )
    fit(Baseline()).save_checkpoint(folder / "baseline.ckpt")
    fit(Fused()).save_checkpoint(folder / "fused.ckpt")
    return folder


class _SaveAt(pl.Callback):
    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"net{trainer.global_step}.ckpt")
