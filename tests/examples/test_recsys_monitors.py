"""The diagnostics on a recommender: Muon's updates are nearly orthogonal, AdamW's are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.optim import AdamW

from examples.recsys.data import SyntheticSequences
from examples.recsys.models import SASRec
from lightning_muon import Muon
from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor
from tests.lightning_helpers import QUIET, weights

STEPS = 30
MATRICES = [
    f"blocks.{block}.{name}.weight"
    for block in range(2)
    for name in ("attention.query", "attention.key", "attention.value", "attention.output", "ffn.0", "ffn.2")
]


class LastStep(L.Callback):
    """Weights before and after the last step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after = weights(pl_module)


def train(optimizer: Callable[..., torch.optim.Optimizer], folder: Path) -> tuple[dict[str, float], LastStep]:
    """Train SASRec on synthetic sequences; returns the values after the last step, and the weights around it."""
    L.seed_everything(0, verbose=False)
    data = SyntheticSequences(num_users=300, batch_size=32)
    data.prepare_data()
    data.setup("fit")
    model = SASRec(num_items=data.num_items, max_length=data.max_length, hidden_size=32, matrix_optimizer=optimizer)
    settings: dict[str, Any] = {"per_parameter": True, "print_table": False, "plot": False}
    last = LastStep()
    monitors = [
        SpectralNormMonitor(**settings),
        UpdateOrthogonalityMonitor(spectrum_every_n_steps=STEPS, **settings),
        EffectiveRankMonitor(spectrum_every_n_steps=STEPS, **settings),
    ]
    trainer = L.Trainer(
        **{**QUIET, "max_steps": STEPS, "max_epochs": -1, "log_every_n_steps": 1, "callbacks": [last, *monitors]},
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}, last


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, float], LastStep]]:
    optimizers = {"muon": partial(Muon, lr=1e-3), "adamw": partial(AdamW, lr=1e-3, weight_decay=0.0)}
    return {name: train(optimizer, tmp_path_factory.mktemp(name)) for name, optimizer in optimizers.items()}


def test_updates_of_muon_are_in_the_range_of_newton_schulz_and_those_of_adamw_are_not(runs: Any) -> None:
    muon, adamw = runs["muon"][0], runs["adamw"][0]
    for name in MATRICES:
        assert 0.1 < muon[f"update_orthogonality_error/{name}"] < 0.6
        assert adamw[f"update_orthogonality_error/{name}"] > 1.0
        assert muon[f"update_effective_rank/{name}"] > 0.9 * 32 > adamw[f"update_effective_rank/{name}"]
        assert adamw[f"update_condition_number/{name}"] > 3 * muon[f"update_condition_number/{name}"]


@pytest.mark.parametrize("run", ["muon", "adamw"])
def test_values_are_those_of_numpy(runs: Any, run: str) -> None:
    logged, last = runs[run]
    for name in MATRICES:
        after = last.after[name].double().numpy()
        values = np.linalg.svd(after, compute_uv=False)
        shares = values / values.sum()
        assert logged[f"spectral_norm/{name}"] == pytest.approx(values[0], rel=1e-4)
        assert logged[f"effective_rank/{name}"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
        assert logged[f"stable_rank/{name}"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-4)
        if run == "adamw":  # float32 weights do not tell Muon's update as well as Muon does
            update = np.linalg.svd(last.before[name].double().numpy() - after, compute_uv=False)
            error = np.sqrt(np.mean((update**2 / np.mean(update**2) - 1) ** 2))
            assert logged[f"update_orthogonality_error/{name}"] == pytest.approx(error, rel=1e-4)
            assert logged[f"update_condition_number/{name}"] == pytest.approx(
                update[0] / np.quantile(update, 0.1), rel=1e-3
            )
