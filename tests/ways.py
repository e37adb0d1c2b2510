"""The same fit by each way to use the package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import schedulefree
import torch

from lightning_muon import Muon, MuonCLI, NorMuon, UseMuon
from lightning_muon.schedules import Schedule
from tests.lightning_helpers import QUIET, Items, Net, WithOptimizer, trainer

WAYS = ("mixin", "UseMuon", "MuonCLI")
KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Muon": Muon,
    "NorMuon": NorMuon,
    "schedulefree": schedulefree.AdamWScheduleFree,
}


def train(
    way: str,
    *,
    kind: type[torch.optim.Optimizer] = Muon,
    lr: float = 0.02,
    other_lr: float = 0.001,
    schedule: Schedule | None = None,
    data: pl.LightningDataModule | None = None,
    callbacks: Sequence[pl.Callback] = (),
    ckpt_path: Any = None,
    classes: tuple[type, type] = (Net, WithOptimizer),
    **kwargs: Any,
) -> pl.Trainer:
    """Fit a module from the same initial weights, and return the Trainer.

    Args:
        way: one of ``WAYS``.
        kind: optimizer of the matrices.
        lr: learning rate of the matrices.
        other_lr: learning rate of AdamW on the rest.
        schedule: the schedule.
        data: data module; 4 batches unless given.
        callbacks: callbacks of the Trainer.
        ckpt_path: a checkpoint to resume.
        classes: the module with the mixin and the same without it.
        **kwargs: arguments of the Trainer, which runs for ``max_epochs``.
    """
    torch.manual_seed(3)
    data = data or Items(4)
    limits = {"max_steps": -1, **kwargs}
    if way == "MuonCLI":
        return _train_by_command_line(kind, lr, other_lr, schedule, data, callbacks, ckpt_path, classes[1], limits)
    settings = {
        "matrix_optimizer": partial(kind, lr=lr),
        "other_optimizer": partial(torch.optim.AdamW, lr=other_lr),
        "schedule": schedule,
    }
    module, extra = (classes[0](**settings), []) if way == "mixin" else (classes[1](), [UseMuon(**settings)])
    used = trainer(callbacks=[*extra, *callbacks], **limits)
    used.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return used


def _train_by_command_line(
    kind: type, lr: float, other_lr: float, schedule: Schedule | None, data: Any, callbacks: Sequence[pl.Callback],
    ckpt_path: Any, module: type, limits: dict[str, Any],
) -> pl.Trainer:  # fmt: skip
    arguments = [
        f"--matrix_optimizer={kind.__module__}.{kind.__qualname__}", f"--matrix_optimizer.lr={lr}",
        "--other_optimizer=torch.optim.AdamW", f"--other_optimizer.lr={other_lr}",
    ]  # fmt: skip
    if schedule is not None:
        arguments += [f"--schedule={type(schedule).__name__}"]
        arguments += [f"--schedule.{key}={value}" for key, value in vars(schedule).items()]
    cli = MuonCLI(
        module,
        args=arguments,
        run=False,
        trainer_defaults={**QUIET, "callbacks": list(callbacks), **limits},
        save_config_callback=None,
        seed_everything_default=3,
    )
    cli.trainer.fit(cli.model, datamodule=data, ckpt_path=ckpt_path)
    return cli.trainer
