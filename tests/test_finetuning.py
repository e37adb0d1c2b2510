"""Freezing and unfreezing under a Trainer, and resuming in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback, LearningRateMonitor
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon import Muon, MuonMixin, NorMuon
from lightning_muon.schedules import Cosine


class Net(MuonMixin, L.LightningModule):
    def __init__(self, deep: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)) if deep else nn.Linear(8, 3)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])


class Hook(Callback):
    """Unfreezes in two stages, by hand."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch >= 1:
            pl_module.backbone[3:].requires_grad_(True)
        if trainer.current_epoch >= 3:
            pl_module.backbone.requires_grad_(True)


class Gradual(BaseFinetuning):
    """Adds one group in each of two stages."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        stages = {1: pl_module.backbone[3:], 3: pl_module.backbone[:3]}
        if epoch in stages:
            self.unfreeze_and_add_param_group(stages[epoch], optimizer, lr=1e-3)


class Remember(Callback):
    """Unfreezes again on resume what these callbacks of Lightning froze at the setup, and forget, under any optimizer:
    they restore the param groups alone.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups if trainer.current_epoch else ():
            for parameter in group["params"]:
                parameter.requires_grad_(True)


def schedulefree(groups: Any) -> Optimizer:
    return pytest.importorskip("schedulefree").AdamWScheduleFree(groups, lr=1e-2)


CHILDREN: dict[str, dict[str, Callable[..., Optimizer]]] = {
    "AdamW": {"matrix_optimizer": partial(AdamW, lr=1e-2)},
    "Muon": {"matrix_optimizer": partial(Muon, lr=1e-2)},
    "NorMuon": {"matrix_optimizer": partial(NorMuon, lr=1e-2)},
    "schedulefree": {"matrix_optimizer": schedulefree},
    "schedulefree other": {"other_optimizer": schedulefree},
}
WAYS: dict[str, Callable[[], Callback]] = {
    "hook": Hook,
    "BackboneFinetuning": partial(BackboneFinetuning, unfreeze_backbone_at_epoch=1),
    "BaseFinetuning": Gradual,
}


def trainer(epochs: int, folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks), **options,
    )  # fmt: skip


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    tensors = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
    return DataLoader(TensorDataset(*tensors), batch_size=8)


pytestmark = pytest.mark.filterwarnings("ignore:.*(trainable hidden matrix|num_workers|already exist within)")


@pytest.mark.parametrize(("way", "deep"), [("hook", True), *((way, False) for way in WAYS)])
@pytest.mark.parametrize("child", CHILDREN)
def test_unfrozen_layers_train_and_resume_exactly(child: str, way: str, deep: bool, tmp_path: Path) -> None:
    start = {name: value.clone() for name, value in Net(deep).state_dict().items()}
    whole = Net(deep, **CHILDREN[child])
    trainer(5, tmp_path, WAYS[way](), gradient_clip_val=0.5).fit(whole, data())
    assert not [name for name, value in whole.state_dict().items() if torch.equal(value, start[name])]
    placed = {n for group in whole.optimizers(use_pl_optimizer=False).param_groups for n in group["param_names"]}
    assert placed == set(start)

    first, second = (Net(deep, **CHILDREN[child]) for _ in range(2))
    half = trainer(3, tmp_path, WAYS[way](), gradient_clip_val=0.5)
    half.fit(first, data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = [WAYS[way](), *([] if way == "hook" else [Remember()])]
    trainer(5, tmp_path, *again, gradient_clip_val=0.5).fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    # A schedule-free optimizer rounds when it changes to the weights that are saved, and back.
    tolerance = 1e-6 if child.startswith("schedulefree") else 0.0
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("child", ["Muon", "schedulefree"])
def test_with_a_schedule(child: str, tmp_path: Path) -> None:
    def net() -> Net:
        return Net(schedule=Cosine(warmup=2), **CHILDREN[child])

    whole, first, second = net(), net(), net()
    trainer(5, tmp_path, Hook()).fit(whole, data())
    half = trainer(3, tmp_path, Hook())
    half.fit(first, data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(5, tmp_path, Hook()).fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    rates, again = ({g["name"]: g["lr"] for g in one.optimizers().param_groups} for one in (whole, second))
    assert again == rates
    assert {rates[name] for name in rates if name.startswith("matrix")} == {rates["matrix"]}


def test_all_parts_of_a_backbone_follow_the_rate_of_the_callback(tmp_path: Path) -> None:
    seen: list[set[float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            late = [g["lr"] for g in trainer.optimizers[0].param_groups if g["name"].endswith("/2")]
            seen.append({round(lr, 9) for lr in late})

    net = Net(deep=False, other_optimizer=partial(AdamW, lr=1e-2), matrix_optimizer=partial(Muon, lr=1e-2))
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, should_align=False)
    trainer(4, tmp_path, callback, Watch()).fit(net, data())
    assert seen[::2] == [set(), {1e-3}, {2e-3}, {4e-3}]


def test_rates_of_frozen_groups_are_logged(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    net = Net(deep=False)
    monitor = LearningRateMonitor("step", log_momentum=True)
    run = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=CSVLogger(tmp_path), enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor, Hook()],
    )  # fmt: skip
    run.fit(net, data())
    assert any(key.endswith("/matrix") for key in monitor.lrs)
