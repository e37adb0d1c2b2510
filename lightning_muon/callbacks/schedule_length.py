"""ScheduleLength: a schedule ends where the run ends."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_muon.callbacks.lookup import callbacks_named
from lightning_muon.schedules import ScheduledLR


class ScheduleLength(Callback):
    """Keeps the end of a schedule at the end of the run when the length of the run changes.

    The remaining steps are counted again at the start of each epoch: after a search for the batch size, with a
    ``GradientAccumulationScheduler``, in a second ``fit``, with another ``max_steps`` or other data on resume.
    With data of unknown length, the schedule follows ``max_steps`` in the first epoch, which gives the length of the
    others. With ``max_time`` the schedule follows the clock if time ends the run first, the same on all processes.
    The learning rate that ``LearningRateFinder`` finds becomes the rate at the schedule's peak.

    In manual optimization the module steps its schedule itself: the length counted at the start of the run stays,
    unless ``max_time`` ends the run. A warning names a schedule that is never stepped.

    A module with :class:`lightning_muon.MuonMixin` and one under :class:`lightning_muon.UseMuon` get this callback
    automatically. It handles only schedulers of :mod:`lightning_muon.schedules`.

    Example::

        >>> trainer = Trainer(callbacks=[ScheduleLength()])
    """

    def __init__(self) -> None:
        self._begins = True
        self._length = math.nan
        self._batches = 0
        self._first = 0
        self._found: Any = None
        self._unstepped: list[ScheduledLR] = []
        self.made: ScheduledLR | None = None
        """The scheduler that ``configure_hybrid_optimizer`` made; the Trainer must have it."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        made = self.made
        if made is None or made.optimizer not in trainer.optimizers:
            return
        kept = [config.scheduler for config in trainer.lr_scheduler_configs]
        kept += [part for scheduler in kept for part in getattr(scheduler, "_schedulers", ())]
        if not any(scheduler is made for scheduler in kept):
            raise RuntimeError(
                f"configure_optimizers of {type(pl_module).__name__} leaves out the scheduler of "
                f"schedule={made.schedule!r}: all learning rates would stay at the values of its first step. Return "
                "the dict with the optimizer and the scheduler unchanged, or leave out schedule to use your own "
                "scheduler."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begins = True
        self._warn_of_unstepped(trainer, pl_module)  # not at the end of an epoch: the module's own hook comes later

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_of_unstepped(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        schedulers = _schedulers(trainer)
        if not schedulers:
            return
        by_hand = not pl_module.automatic_optimization
        begins, self._begins = self._begins, False
        if begins and not by_hand:
            self._take_found_rate(trainer)
            self._length = schedulers[0].last_epoch + steps_left(trainer, batch_idx, self._batches)
        elif math.isnan(self._length):  # manual optimization keeps the length at the start
            self._length = schedulers[0].total_steps
        self._batches = batch_idx + 1
        if not (begins or _steps_now(trainer, batch_idx)):
            return
        share = share_of_time(trainer)
        if share is None and (by_hand or not begins):
            return
        for scheduler in schedulers:
            by_clock = (scheduler.last_epoch + 0.5) / share if share else math.inf
            scheduler.set_length(max(min(self._length, by_clock), 1.0))

    def _warn_of_unstepped(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for scheduler in _schedulers(trainer):
            if scheduler.last_epoch == 0 and trainer.global_step > self._first and scheduler not in self._unstepped:
                self._unstepped.append(scheduler)
                how = (
                    "Call self.lr_schedulers().step() after each step of the optimizer: the schedule counts these."
                    if not pl_module.automatic_optimization
                    else "Call scheduler.step() in lr_scheduler_step."
                )
                rank_zero_warn(
                    f"{type(pl_module).__name__} has the schedule {scheduler.schedule!r}, but never steps it: all "
                    f"learning rates stay at the values of its first step. {how}"
                )

    def _take_found_rate(self, trainer: Trainer) -> None:
        """Make the rate that a LearningRateFinder wrote into ``lr`` the peak; otherwise the next step overwrites it."""
        for finder in callbacks_named(trainer, "LearningRateFinder"):
            if finder.optimal_lr is None or finder.optimal_lr is self._found:
                continue
            self._found = finder.optimal_lr
            rate = self._found.suggestion()
            for scheduler in _schedulers(trainer):
                groups = scheduler.optimizer.param_groups
                if rate is not None and all(group["lr"] == rate for group in groups):
                    for group in groups:
                        group["initial_lr"] = rate


def steps_of_run(trainer: Trainer) -> float:
    """Optimizer steps of a fit that is about to start; infinite if unknown. Loads the training data if need be."""
    if trainer.max_epochs != -1 or trainer.max_steps != -1:
        _ = trainer.estimated_stepping_batches  # loads the data, to count the batches
    return steps_left(trainer, 0)


def steps_left(trainer: Trainer, batches_done: int, last_epoch: int = 0) -> float:
    """Optimizer steps until the end of the run; infinite if unknown.

    Args:
        trainer: about to train a batch.
        batches_done: how many batches of the current epoch are done.
        last_epoch: batches of the epoch before, used if the data has no length; 0 if there was none.
    """
    by_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps - trainer.global_step
    batches = trainer.num_training_batches
    if math.isinf(batches) and last_epoch:
        batches = last_epoch
    if trainer.max_epochs in (-1, None) or math.isinf(batches):
        return by_steps
    first = trainer.current_epoch
    epochs = [math.ceil(batches / _accumulation(trainer, epoch)) for epoch in range(first, trainer.max_epochs)]
    # A search for the batch size during the run keeps the count of old batches: count one more step of the epoch.
    done = min(batches_done // _accumulation(trainer, first), max(epochs[0] - 1, 0)) if epochs else 0
    return min(by_steps, sum(epochs) - done)


def share_of_time(trainer: Trainer) -> float | None:
    """Share of ``max_time`` that is used, the same on all processes; None without a limit."""
    shares = []
    for timer in callbacks_named(trainer, "Timer"):
        left = timer.time_remaining()
        if left is not None:
            elapsed = timer.time_elapsed()
            shares.append(min(elapsed / max(elapsed + left, 1e-9), 1.0))
    return trainer.strategy.broadcast(max(shares)) if shares else None


def _steps_now(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this batch; the time is not needed after others."""
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches


def _accumulation(trainer: Trainer, epoch: int) -> int:
    for scheduler in callbacks_named(trainer, "GradientAccumulationScheduler"):
        return int(scheduler.get_accumulate_grad_batches(epoch))
    return trainer.accumulate_grad_batches


def _schedulers(trainer: Trainer) -> list[ScheduledLR]:
    return [c.scheduler for c in trainer.lr_scheduler_configs if isinstance(c.scheduler, ScheduledLR)]
