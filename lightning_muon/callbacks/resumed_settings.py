"""ResumedSettings: reports the settings that a resumed run uses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_muon.callbacks.lookup import callbacks_named
from lightning_muon.optim import HybridOptimizer
from lightning_muon.schedules import SAVED_SCHEDULE, ScheduledLR

_PLAIN = (bool, int, float, str, tuple)


class ResumedSettings(Callback):
    """Reports the learning rates, options and schedule that a run resumed from a checkpoint uses.

    The checkpoint's learning rates and options override those given, as everywhere in torch and Lightning. A warning
    names the given ones that are not used. A run saved with a schedule and resumed without one would stay at the
    learning rate of its last step, often 0: this raises a ``RuntimeError``.

    A module with :class:`lightning_muon.MuonMixin` and one under :class:`lightning_muon.UseMuon` get this callback
    automatically.

    Args:
        optimizer: the optimizer as it was built, before the checkpoint's state is loaded.
    """

    def __init__(self, optimizer: HybridOptimizer) -> None:
        self.optimizer = optimizer
        self._record_given()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record_given()  # schedulers exist and may set peaks; the checkpoint is not loaded yet

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.ckpt_path or self.optimizer not in trainer.optimizers:
            return
        if any(averaging._scheduler_state for averaging in callbacks_named(trainer, "StochasticWeightAveraging")):
            return  # it sets its own learning rates
        groups = self.optimizer.param_groups
        scheduled = [group for group in groups if "initial_lr" in group]
        if scheduled and not trainer.lr_scheduler_configs and not self._by_hand:
            rates = ", ".join(f"{group['name']} {group['lr']:.3g}" for group in scheduled)
            raise RuntimeError(
                f"The checkpoint {trainer.ckpt_path} was saved under a schedule, and {type(pl_module).__name__} has "
                f"none now: the learning rates would stay where the schedule left them ({rates}). Give the schedule "
                "again, e.g. schedule=Cosine(), or schedule=Constant() to go on at its peak (--schedule on a command "
                "line). To train with new learning rates, load the weights alone: call load_from_checkpoint, and fit "
                "without ckpt_path."
            )
        # Schedulers without a peak, such as ReduceLROnPlateau, have lowered the rate itself.
        adaptive = any(not isinstance(config.scheduler, ScheduledLR) for config in trainer.lr_scheduler_configs)
        changed = [
            f"{group['name']} {peak:.3g} (given now: {self.given[group['name']]:.3g})"
            for group in groups
            if group.get("name") in self.given
            and ("initial_lr" in group or not adaptive)
            and (peak := float(group.get("initial_lr", group["lr"]))) != self.given[group["name"]]
        ]
        if changed:
            rank_zero_warn(
                f"The run goes on with the learning rates of its checkpoint, not with those given now: "
                f"{', '.join(changed)}. To use new rates, load the weights alone: call load_from_checkpoint, and fit "
                "without ckpt_path."
            )
        options = [
            f"{key} of {group['name']} {group[key]} (given now: {value})"
            for group in groups
            for key, value in self.options.get(group.get("name", ""), {}).items()
            if group.get(key) != value and not (adaptive and key in ("momentum", "betas"))
        ]
        if options:
            rank_zero_warn(
                f"The run goes on with the options of its checkpoint, not with those given now: {', '.join(options)}. "
                "To use new ones, load the weights alone: call load_from_checkpoint, and fit without ckpt_path."
            )
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            saved = getattr(scheduler, SAVED_SCHEDULE, None)  # torch sets every entry of a state as an attribute
            if saved is not None and not isinstance(scheduler, ScheduledLR):
                rank_zero_warn(
                    f"The saved run had the schedule {saved}. {type(scheduler).__name__} goes on now, from the "
                    "learning rates at which the schedule ended."
                )
            if isinstance(scheduler, ScheduledLR) and scheduler.last_epoch == 0 and trainer.global_step > 0:
                rank_zero_warn(
                    f"The checkpoint was saved without a schedule: {scheduler.schedule!r} starts now, over the rest of "
                    "the run."
                )

    def _record_given(self) -> None:
        groups = self.optimizer.param_groups
        self.given: Mapping[str, float] = {g["name"]: float(g.get("initial_lr", g["lr"])) for g in groups}
        children = getattr(self.optimizer, "optimizers", {"": self.optimizer}).values()
        known = {name for child in children for name in inspect.signature(type(child)).parameters} - {"lr", "params"}
        self.options: Mapping[str, dict[str, Any]] = {
            g["name"]: {key: g[key] for key in known & g.keys() if isinstance(g[key], _PLAIN)} for g in groups
        }
        self._by_hand = any("initial_lr" in group for group in groups)  # a scheduler of the module, or of Lightning
