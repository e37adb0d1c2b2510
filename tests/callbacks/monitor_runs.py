"""The three monitors in a Trainer: their construction, modules to watch, and a logger that stores their values."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from tests.lightning_helpers import Bare, Net, fit

QUANTITIES = {
    "spectral_norm",
    "update_orthogonality_error",
    "update_condition_number",
    "stable_rank",
    "participation_ratio",
    "effective_rank",
    "update_stable_rank",
    "update_participation_ratio",
    "update_effective_rank",
}
CLOCKED = {"update_condition_number", "effective_rank", "update_effective_rank"}  # those on the spectrum clock


def monitors(spectrum_every_n_steps: int | None = None, **settings: Any) -> list[pl.Callback]:
    """All three, with the same settings; silent unless told otherwise."""
    settings = {"print_table": False, "plot": False, **settings}
    return [
        SpectralNormMonitor(**settings),
        UpdateOrthogonalityMonitor(spectrum_every_n_steps=spectrum_every_n_steps, **settings),
        EffectiveRankMonitor(spectrum_every_n_steps=spectrum_every_n_steps, **settings),
    ]


class Plain(Bare):
    """Trained by AdamW alone."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class Dropped(Net):
    """Has dropout, which draws random numbers at each step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        items, targets = batch
        scores = nn.functional.dropout(self.layers(items), 0.2, self.training)
        return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


class Recorder(Logger):
    """Keeps each call of ``log_metrics``; has no folder unless one is given."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.folder = folder

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    @property
    def save_dir(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def values(self) -> dict[tuple[int, str], float]:
        """What monitors logged, by step and key; each must have been logged once."""
        found: dict[tuple[int, str], float] = {}
        for step, metrics in self.rows:
            for key, value in metrics.items():
                if key.split("/")[0] in QUANTITIES:
                    assert (step, key) not in found, f"{key} was logged twice at step {step}"
                    found[step, key] = float(value)
        return found

    def steps(self, key: str) -> list[int]:
        """At which steps a key of a monitor was logged."""
        return [step for step, logged in self.values() if logged == key]


def watched(
    module: pl.LightningModule, callbacks: list[pl.Callback], logger: Recorder | None = None, **kwargs: Any
) -> tuple[pl.Trainer, Recorder]:
    """Fit with a recorder that takes every step; keywords as of :func:`tests.lightning_helpers.fit`."""
    recorder = logger or Recorder()
    return fit(module, callbacks=callbacks, logger=recorder, **{"log_every_n_steps": 1, **kwargs}), recorder


def table_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of all CSV files of monitors below a folder."""
    rows: list[dict[str, str]] = []
    for path in sorted(folder.rglob("spectral/*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows
