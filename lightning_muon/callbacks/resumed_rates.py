"""ResumedRates: what a resumed run goes on with is said."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_muon.optim import HybridOptimizer
from lightning_muon.schedules import ScheduledLR


class ResumedRates(Callback):
    """Says which learning rates and which schedule a run goes on with that continues from a checkpoint.

    The checkpoint's rates count, as everywhere in torch and Lightning. A warning names those that were given and are
    not used. A run that was saved under a schedule and is given none would stay at the rate of its last step, often
    0: it is refused.

    A module with :class:`lightning_muon.MuonMixin` and one under :class:`lightning_muon.UseMuon` get this callback by
    themselves.

    Args:
        optimizer: the optimizer as it was built, before the checkpoint's state is loaded.
    """

    def __init__(self, optimizer: HybridOptimizer) -> None:
        self.optimizer = optimizer
        self.given: Mapping[str, float] = optimizer.configured_rates

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.ckpt_path or self.optimizer not in trainer.optimizers:
            return
        groups = self.optimizer.param_groups
        scheduled = [group for group in groups if "initial_lr" in group]
        if scheduled and not trainer.lr_scheduler_configs:
            rates = ", ".join(f"{group['name']} {group['lr']:.3g}" for group in scheduled)
            raise RuntimeError(
                f"The checkpoint {trainer.ckpt_path} was saved under a schedule, and {type(pl_module).__name__} has "
                f"none now: the learning rates would stay where the schedule left them ({rates}). Give the schedule "
                "again, e.g. schedule=Cosine(), or schedule=Constant() to go on at its peak. To train with new rates "
                "load the weights alone: load_from_checkpoint, and fit without ckpt_path."
            )
        changed = [
            f"{name} {rate:.3g} (given now: {self.given[name]:.3g})"
            for name, rate in self.optimizer.peak_rates.items()
            if name in self.given and rate != self.given[name]
        ]
        if changed:
            rank_zero_warn(
                f"The run goes on with the learning rates of its checkpoint, not with those given now: "
                f"{', '.join(changed)}. To use new rates load the weights alone: load_from_checkpoint, and fit without "
                "ckpt_path."
            )
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, ScheduledLR) and scheduler.last_epoch == 0 and trainer.global_step > 0:
                rank_zero_warn(
                    f"The checkpoint was saved without a schedule: {scheduler.schedule!r} starts now, over the rest of "
                    "the run."
                )
