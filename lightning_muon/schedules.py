"""Learning-rate schedules: one multiplier for every param group, a pure function of training progress."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

SAVED_SCHEDULE = "schedule_name"
"""Where the state of a :class:`ScheduledLR` keeps its schedule, as text."""


class Schedule(ABC):
    """A multiplier of all learning rates that depends on nothing but progress, so that their ratios stay as set.

    The multiplier rises linearly from 0 to 1 over the warmup; a subclass defines the rest in :meth:`after_warmup`.
    Lengths below 1 are fractions of the run, lengths of 1 or more are optimizer steps. Step ``i`` of ``n`` takes the
    value in the middle of its interval, at progress ``(i + 1/2) / n``. So neither the first step of a warmup nor the
    last step of a decay to zero has a learning rate of 0.

    Args:
        warmup: length of the warmup; 0 for none.

    Raises:
        ValueError: if a length is negative, not finite, or a number of steps that is not whole.
    """

    def __init__(self, warmup: float = 0.0) -> None:
        self.warmup = _checked_length("warmup", warmup)

    def __call__(self, progress: float, total_steps: float | None = None) -> float:
        """Return the multiplier at a point of the run.

        Args:
            progress: share of the run that is done, from 0 (start) to 1 (end); beyond 1 the final value stays.
            total_steps: optimizer steps of the run, needed where a length is given in steps.

        Raises:
            ValueError: if progress is negative, or a length is given in steps and ``total_steps`` is not.
        """
        if not progress >= 0.0:
            raise ValueError(f"progress must be 0 (start of the run) or more, got {progress}.")
        warmup = _share_of_run("warmup", self.warmup, total_steps)
        if progress < warmup:
            return progress / warmup
        return self.after_warmup(min(progress, 1.0), warmup, total_steps)

    @abstractmethod
    def after_warmup(self, progress: float, warmup: float, total_steps: float | None) -> float:
        """The multiplier at ``progress``, in [warmup, 1]; ``warmup`` is a share of the run here."""

    def at_step(self, step: int, total_steps: float) -> float:
        """The multiplier of optimizer step ``step``, counted from 0, in a run of ``total_steps``."""
        return self((step + 0.5) / total_steps, total_steps)

    def scheduler(self, optimizer: Optimizer, total_steps: float, last_epoch: int = -1) -> ScheduledLR:
        """Return a scheduler that applies this schedule to every param group; call ``step()`` after the optimizer's.

        Args:
            optimizer: the optimizer to schedule.
            total_steps: optimizer steps of the whole run.
            last_epoch: number of the last step taken; -1 for a new run.

        Raises:
            ValueError: if ``total_steps`` is infinite, unknown or not positive.
        """
        if not (math.isfinite(total_steps) and total_steps >= 1):
            raise ValueError(
                f"{type(self).__name__} needs the number of optimizer steps of the run, got total_steps={total_steps}. "
                "An endless run, or data of unknown length, needs max_steps: Trainer(max_steps=...)."
            )
        total_steps = int(total_steps)
        self._warn_if_cut(total_steps)
        return ScheduledLR(optimizer, self, total_steps, last_epoch)

    def _warn_if_cut(self, total_steps: int) -> None:
        if self.warmup > total_steps:
            warnings.warn(
                f"The run of {total_steps} steps ends within the warmup of {self.warmup:g} steps.", stacklevel=3
            )

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class ScheduledLR(LambdaLR):
    """Sets the learning rate of each param group to its own peak rate times the multiplier of a schedule.

    It is a ``torch.optim.lr_scheduler.LambdaLR`` with one multiplier for all groups. Groups may join during the run,
    e.g. when layers are unfrozen: the learning rate of a new group is its rate at the peak of the schedule. The state
    holds the number of steps taken and the name of the schedule. A resumed run follows the schedule and the length of
    the run that are given to it; if the saved schedule was another, a warning says so.

    Args:
        optimizer: the optimizer to schedule.
        schedule: gives the multiplier.
        total_steps: optimizer steps of the whole run.
        last_epoch: number of the last step taken; -1 for a new run.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, total_steps: float, last_epoch: int = -1) -> None:
        self.schedule = schedule
        self.total_steps = total_steps
        LRScheduler.__init__(self, optimizer, last_epoch)

    @property
    def lr_lambdas(self) -> list[Callable[[int], float]]:  # type: ignore[override]
        """The multiplier as a function of the step, once per group: callbacks that add groups read this list."""
        return [lambda step: self.schedule.at_step(step, self.total_steps)] * len(self.optimizer.param_groups)

    def get_lr(self) -> list[Any]:
        """Return the learning rates of the next step, one per group."""
        multiplier = self.schedule.at_step(self.last_epoch, self.total_steps)
        return [group.setdefault("initial_lr", group["lr"]) * multiplier for group in self.optimizer.param_groups]

    def set_length(self, total_steps: float) -> None:
        """Change the length of the run, and the learning rates of the next step with it.

        Args:
            total_steps: optimizer steps of the whole run, including those that are done.
        """
        self.total_steps = total_steps
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain values, which load with ``weights_only=True``."""
        state: dict[str, Any] = LRScheduler.state_dict(self)
        kept = {key: value for key, value in state.items() if key not in ("schedule", "total_steps")}
        return {**kept, SAVED_SCHEDULE: repr(self.schedule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step at which ``state_dict`` was saved; warn if the saved schedule was another.

        The state of a scheduler of another class is not loaded, as it may count epochs: the schedule starts anew.
        """
        own = LRScheduler.state_dict(self).keys() - {"schedule", "total_steps"}
        foreign = sorted(k for k in state_dict if k not in {*own, SAVED_SCHEDULE, "verbose"} and not k.startswith("_"))
        if foreign:
            warnings.warn(
                f"The saved run had a scheduler of another kind (its state has {', '.join(foreign)}). Its state is "
                f"not loaded: {self.schedule!r} starts anew.",
                stacklevel=2,
            )
            return
        LRScheduler.load_state_dict(self, {key: value for key, value in state_dict.items() if key in own})
        saved = state_dict.get(SAVED_SCHEDULE)
        if saved is not None and saved != repr(self.schedule):
            warnings.warn(
                f"The saved run had the schedule {saved}. This run goes on at step {self.last_epoch} with "
                f"{self.schedule!r}, the schedule that is given now.",
                stacklevel=2,
            )


class Constant(Schedule):
    """Warmup, then 1.

    Args:
        warmup: length of the warmup: a fraction of the run below 1, optimizer steps from 1 on.

    Example::

        >>> [Constant(warmup=4).at_step(step, 100) for step in (0, 1, 4, 50)]
        [0.125, 0.375, 1.0, 1.0]
    """

    def after_warmup(self, progress: float, warmup: float, total_steps: float | None) -> float:
        return 1.0


class Linear(Schedule):
    """Warmup, then a straight line from 1 to ``final`` at the end of the run.

    Args:
        warmup: length of the warmup: a fraction of the run below 1, optimizer steps from 1 on.
        final: multiplier at the end of the run, 0 or more.

    Example::

        >>> [round(Linear(warmup=0.1, final=0.0).at_step(step, 100), 3) for step in (0, 5, 10, 55)]
        [0.05, 0.55, 0.994, 0.494]
    """

    def __init__(self, warmup: float = 0.0, final: float = 0.0) -> None:
        super().__init__(warmup)
        self.final = _checked_final(final)

    def after_warmup(self, progress: float, warmup: float, total_steps: float | None) -> float:
        return 1.0 + (self.final - 1.0) * _share_done(progress, warmup)


class Cosine(Schedule):
    """Warmup, then half a cosine from 1 to ``final`` at the end of the run (SGDR without restarts, arXiv 1608.03983).

    Args:
        warmup: length of the warmup: a fraction of the run below 1, optimizer steps from 1 on.
        final: multiplier at the end of the run, 0 or more.

    Example::

        >>> [round(Cosine(warmup=0.1, final=0.1).at_step(step, 100), 3) for step in (0, 10, 55)]
        [0.05, 1.0, 0.542]
    """

    def __init__(self, warmup: float = 0.0, final: float = 0.0) -> None:
        super().__init__(warmup)
        self.final = _checked_final(final)

    def after_warmup(self, progress: float, warmup: float, total_steps: float | None) -> float:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * _share_done(progress, warmup)))


class WarmupStableDecay(Schedule):
    """Warmup, then 1, then a straight line to ``final`` over the last part of the run (arXiv 2404.06395).

    A run too short for both keeps its warmup and decays over what is left.

    Args:
        warmup: length of the warmup: a fraction of the run below 1, optimizer steps from 1 on.
        decay: length of the decay, likewise.
        final: multiplier at the end of the run, 0 or more.

    Raises:
        ValueError: if warmup and decay are fractions that add up to more than the run.

    Example::

        >>> [round(WarmupStableDecay(warmup=10, decay=0.2).at_step(step, 100), 3) for step in (5, 10, 80, 90)]
        [0.55, 1.0, 0.975, 0.475]
    """

    def __init__(self, warmup: float = 0.0, decay: float = 0.2, final: float = 0.0) -> None:
        super().__init__(warmup)
        self.decay = _checked_length("decay", decay)
        self.final = _checked_final(final)
        if self.warmup < 1 and self.decay < 1 and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup={warmup} and decay={decay} are fractions of the run and add up to more than 1. Shorten one."
            )

    def after_warmup(self, progress: float, warmup: float, total_steps: float | None) -> float:
        start = max(warmup, 1.0 - _share_of_run("decay", self.decay, total_steps))
        return 1.0 + (self.final - 1.0) * _share_done(max(progress, start), start)

    def _warn_if_cut(self, total_steps: int) -> None:
        super()._warn_if_cut(total_steps)
        warmup = _share_of_run("warmup", self.warmup, total_steps)
        decay = _share_of_run("decay", self.decay, total_steps)
        if warmup < 1 < warmup + decay:
            warnings.warn(
                f"warmup={self.warmup:g} and decay={self.decay:g} do not fit in the run of {total_steps} steps: the "
                "decay begins at the end of the warmup and is shorter than asked.",
                stacklevel=3,
            )


def _checked_length(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"{name} must be 0 or more, got {value}. Below 1 it is a fraction of the run, from 1 on a number of steps."
        )
    if value >= 1 and value != int(value):
        raise ValueError(f"{name}={value} is read as a number of steps, because it is not below 1, and must be whole.")
    return value


def _checked_final(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"final, the multiplier at the end of the run, must be 0 or more, got {value}.")
    return value


def _share_of_run(name: str, length: float, total_steps: float | None) -> float:
    if length < 1:
        return length
    if total_steps is None:
        raise ValueError(f"{name}={length:g} is a number of steps: also give total_steps, the length of the run.")
    return length / total_steps


def _share_done(progress: float, start: float) -> float:
    """How much of the interval from ``start`` to the end of the run is done, in [0, 1]."""
    return (progress - start) / (1.0 - start) if start < 1.0 else 1.0
