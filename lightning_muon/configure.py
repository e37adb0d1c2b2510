"""What ``configure_optimizers`` returns to train a LightningModule with a hybrid optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import AdamW

from lightning_muon.callbacks.create_graph import CreateGraph
from lightning_muon.callbacks.late_parameters import LateParameters
from lightning_muon.callbacks.lookup import callbacks_named
from lightning_muon.callbacks.optimizer_modes import OptimizerModes
from lightning_muon.callbacks.partition_summary import PartitionSummary
from lightning_muon.callbacks.resumed_settings import ResumedSettings
from lightning_muon.callbacks.running import partition_of
from lightning_muon.callbacks.schedule_length import ScheduleLength, share_of_time, steps_of_run
from lightning_muon.optim import HybridOptimizer, MatrixOptimizer, Muon
from lightning_muon.optim.foreign import differentiates_gradients, has_modes
from lightning_muon.partition import ParameterRule
from lightning_muon.partition.partition import LAYOUTS_KEY
from lightning_muon.schedules import Schedule, ScheduledLR

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

# On a command line jsonargparse takes arguments that are given without a class for those of the first return type: of
# Muon and AdamW. The default stays None, as another class would inherit the arguments of a default. Optimizers of this
# package come before all others, so that the bare name Muon is not taken for torch.optim.Muon.
MatrixOptimizerCallable: TypeAlias = (
    Callable[[Iterable[Any]], Muon] | Callable[[Iterable[Any]], MatrixOptimizer] | OptimizerCallable
)
OtherOptimizerCallable: TypeAlias = Callable[[Iterable[Any]], AdamW] | OptimizerCallable


REACHED = "_muon_mixin_reached"
"""While a ``configure_optimizers`` runs: where :func:`configure_hybrid_optimizer` leaves in the module what it made."""


def configure_hybrid_optimizer(
    module: LightningModule,
    matrix_optimizer: MatrixOptimizerCallable | None = None,
    other_optimizer: OtherOptimizerCallable | None = None,
    schedule: Schedule | None = None,
    parameter_rules: Sequence[ParameterRule] = (),
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` of any LightningModule may return to train it as :class:`MuonMixin` does.

    Use it to keep a scheduler of your own, or a ``configure_optimizers`` that does more::

        def configure_optimizers(self):
            optimizer = configure_hybrid_optimizer(self, matrix_optimizer=partial(Muon, lr=1e-3))
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10)}

    Under a Trainer it also adds callbacks: the partition is printed where the Trainer shows its model summary, a
    schedule ends with the run, a resumed run says what it goes on with, and parameters that join later are trained.

    Args:
        module: the module to train.
        matrix_optimizer: called with the param groups of the matrices; None for Muon.
        other_optimizer: called with the other param groups; None for AdamW.
        schedule: multiplier of all learning rates; None to leave them constant.
        parameter_rules: where parameters go and with which options, on top of what is found by itself.

    Returns:
        The :class:`HybridOptimizer`, or with a schedule a dict of Lightning's with ``"optimizer"`` and
        ``"lr_scheduler"``.

    Raises:
        TypeError: if the module is no LightningModule, an optimizer is given instead of what makes one, or the schedule
            is no ``Schedule``.
        ValueError: if the schedule needs the length of a run that has none; names ``max_steps``.
        RuntimeError: if there is a schedule but no Trainer, if the strategy shards matrices into flat pieces, if
            gradients cannot be differentiated where an optimizer does so, or if a ``LearningRateFinder`` would give
            groups of different rates one rate.
    """
    if not any(base.__name__ == "LightningModule" for base in type(module).__mro__):
        raise TypeError(
            f"configure_hybrid_optimizer takes the LightningModule, got {type(module).__name__}. For a part of it use "
            "HybridOptimizer.from_module(part)."
        )
    check_settings(matrix_optimizer, other_optimizer, schedule)
    trainer = attached_trainer(module)
    if trainer is not None:
        _check_strategy(trainer)
        _warn_if_clipped_by_value(trainer)
    optimizer = HybridOptimizer.from_module(module, matrix_optimizer, other_optimizer, parameter_rules)
    if trainer is not None:
        _check_rate_finder(trainer, optimizer)
        _warn_of_averaging_rate(trainer, optimizer)
        _add_callbacks(trainer, optimizer)
        watch_parameters(trainer, optimizer, parameter_rules)
    if schedule is None:
        return _made(module, optimizer)
    if trainer is None:
        raise RuntimeError(
            f"{type(module).__name__} has a schedule but no Trainer that knows the length of the run. Outside a "
            "Trainer, construct the module without schedule and use schedule.scheduler(optimizer, total_steps)."
        )
    scheduler = _scheduler(schedule, optimizer, trainer)
    next(c for c in trainer.callbacks if type(c) is ScheduleLength).made = scheduler  # type: ignore[attr-defined]
    return _made(
        module,
        {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}},
    )


def check_settings(matrix_optimizer: object, other_optimizer: object, schedule: object, where: str = "") -> None:
    """Raise ``TypeError`` unless the settings are what makes optimizers, and a schedule.

    Args:
        matrix_optimizer: the setting, or None.
        other_optimizer: likewise.
        schedule: likewise.
        where: what the settings are attributes of, for the message, e.g. ``"Net."``.
    """
    for name, value in (("matrix_optimizer", matrix_optimizer), ("other_optimizer", other_optimizer)):
        if value is not None and not callable(value):
            raise TypeError(
                f"{where}{name} must be a class or function that is called with param groups, e.g. "
                f"functools.partial(Muon, lr=1e-3), got an object of type {type(value).__name__}."
            )
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"{where}schedule must be a lightning_muon.schedules.Schedule, e.g. Cosine(warmup=0.02), got {schedule!r}."
        )


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The Trainer of a module; None without one and under Fabric."""
    try:
        trainer = module.trainer
    except RuntimeError:  # no Trainer
        return None
    return trainer if hasattr(trainer, "max_steps") else None  # Fabric stands in for a Trainer


def add_matrix_layouts(
    checkpoint: dict[str, Any], module: LightningModule, parameter_rules: Sequence[ParameterRule] = ()
) -> None:
    """Write into a checkpoint how the running optimizer reads the matrices of a module (:meth:`Partition.layouts`).

    A module without a Trainer, or one that trains without an optimizer of this package, is read under
    ``parameter_rules``.
    """
    trainer = attached_trainer(module)
    try:
        partition, _ = partition_of(module, trainer.optimizers if trainer is not None else (), parameter_rules)
        checkpoint[LAYOUTS_KEY] = partition.layouts()
    except (TypeError, ValueError) as error:  # no reason to lose a checkpoint
        rank_zero_warn(f"The checkpoint does not say how matrices are read: {error}")


def watch_parameters(trainer: Trainer, optimizer: HybridOptimizer, rules: Sequence[ParameterRule] = ()) -> None:
    """Have parameters that join later trained, and those that no optimizer has named; see :class:`LateParameters`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [LateParameters(optimizer, rules), *(c for c in callbacks if type(c) is not LateParameters)]


def _made(module: LightningModule, configured: OptimizerLRScheduler) -> OptimizerLRScheduler:
    """Tells the ``configure_optimizers`` that is under way, if it asks, what it has been given."""
    if REACHED in vars(module):
        vars(module)[REACHED] = configured
    return configured


def _scheduler(schedule: Schedule, optimizer: HybridOptimizer, trainer: Trainer) -> ScheduledLR:
    steps = steps_of_run(trainer)
    if share_of_time(trainer) is not None and steps == float("inf"):
        return ScheduledLR(optimizer, schedule, steps)  # the clock tells, once the run is under way
    return schedule.scheduler(optimizer, 1 if steps == 0 else steps)  # a fit of no steps needs no rate


def _check_strategy(trainer: Trainer) -> None:
    for name in (cls.__name__ for cls in type(trainer.strategy).__mro__):
        if name in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise RuntimeError(
                f"{name} flattens matrices into one-dimensional shards, so that none is left to orthogonalize. Use "
                "strategy='ddp', which keeps them whole."
            )


def _warn_if_clipped_by_value(trainer: Trainer) -> None:
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_algorithm == "value":
        rank_zero_warn(
            "gradient_clip_algorithm='value' changes the direction of a matrix's gradient, which is what Muon goes by. "
            "gradient_clip_algorithm='norm' keeps it."
        )


def _check_rate_finder(trainer: Trainer, optimizer: HybridOptimizer) -> None:
    """A search over one rate says nothing about groups whose rates differ, and what a Tuner finds has to be given."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    if callbacks_named(trainer, "LearningRateFinder") and len(set(rates.values())) > 1:
        given = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        raise RuntimeError(
            f"LearningRateFinder tries one learning rate for all param groups. These have different ones ({given}), "
            "whose ratio would be lost. Either give both optimizers the same lr (Muon's default "
            "lr_scale='match_rms_adamw' makes AdamW's rates fit the matrices), or remove LearningRateFinder "
            "(Tuner.lr_find) and try several values of matrix_optimizer's lr and of other_optimizer's."
        )
    for finder in callbacks_named(trainer, "LearningRateFinder"):
        module = trainer.lightning_module
        name = next((n for n in (finder._attr_name, "lr", "learning_rate") if hasattr(module, n)), "lr")
        held = module.hparams.get(name, getattr(module, name, None))
        if finder._early_exit and finder._update_attr and held not in rates.values():
            rank_zero_warn(
                f"Tuner.lr_find writes its rate into {type(module).__name__}.{name}, and no param group takes its rate "
                "from there: the fits that follow do not use it. Give its suggestion() as lr to matrix_optimizer and "
                "other_optimizer, or use the callback LearningRateFinder, whose rate the fit goes on with."
            )


def _warn_of_averaging_rate(trainer: Trainer, optimizer: HybridOptimizer) -> None:
    """StochasticWeightAveraging anneals all groups to one rate where it is given one."""
    names = [group["name"] for group in optimizer.param_groups]
    rates = {group["lr"] for group in optimizer.param_groups}
    for averaging in callbacks_named(trainer, "StochasticWeightAveraging"):
        target = getattr(averaging, "_swa_lrs", None)
        if isinstance(target, float) and len(rates) > 1:
            rank_zero_warn(
                f"StochasticWeightAveraging(swa_lrs={target:g}) anneals all param groups to this one learning rate. To "
                f"keep their ratio give a list of {len(names)} rates, for {', '.join(names)}."
            )


def _add_callbacks(trainer: Trainer, optimizer: HybridOptimizer) -> None:
    """What has to happen around the steps of a hybrid; those of an earlier fit are replaced."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = (ScheduleLength, ResumedSettings)
    callbacks[:] = [callback for callback in callbacks if type(callback) not in ours and not _of_earlier_fit(callback)]
    # First, so that monitors of the learning rate see the rate of the step that comes.
    callbacks[:0] = [ScheduleLength(), ResumedSettings(optimizer)]
    if callbacks_named(trainer, "ModelSummary") and not callbacks_named(trainer, "PartitionSummary"):
        summary = PartitionSummary()
        summary.only_for = optimizer
        callbacks.append(summary)
    needed = _needed_by_children(trainer, optimizer)
    present = {type(callback) for callback in callbacks}
    callbacks.extend(kind() for kind in needed if kind not in present)


def _of_earlier_fit(callback: Callback) -> bool:
    return isinstance(callback, PartitionSummary) and callback.only_for is not None


def _needed_by_children(trainer: Trainer, optimizer: HybridOptimizer) -> list[type[CreateGraph] | type[OptimizerModes]]:
    """What optimizers of other packages need around the step; nothing for most."""
    needed: list[type[CreateGraph] | type[OptimizerModes]] = []
    children = optimizer.optimizers.values()
    if any(map(has_modes, children)):
        needed.append(OptimizerModes)
    second_order = [type(child).__name__ for child in children if differentiates_gradients(child)]
    if second_order:
        if trainer.world_size > 1 or getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise RuntimeError(
                f"{second_order[0]} differentiates the gradients, and those that several processes average or a "
                "gradient scaler scales have the wrong derivatives. Train in one process without '16-mixed'."
            )
        needed.append(CreateGraph)
    return needed
