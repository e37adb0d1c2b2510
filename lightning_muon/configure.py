"""configure_hybrid_optimizer: a hybrid optimizer for the ``configure_optimizers`` of any LightningModule."""

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

# On a command line, jsonargparse passes arguments without a class to the first return type: Muon or AdamW. The default
# stays None, because another class would inherit the arguments of a default. Optimizers of this package come before
# all others, so that the bare name Muon does not mean torch.optim.Muon.
MatrixOptimizerCallable: TypeAlias = (
    Callable[[Iterable[Any]], Muon] | Callable[[Iterable[Any]], MatrixOptimizer] | OptimizerCallable
)
OtherOptimizerCallable: TypeAlias = Callable[[Iterable[Any]], AdamW] | OptimizerCallable


REACHED = "_muon_mixin_reached"
"""Attribute of a module while its ``configure_optimizers`` runs: what :func:`configure_hybrid_optimizer` returned."""


def configure_hybrid_optimizer(
    module: LightningModule,
    matrix_optimizer: MatrixOptimizerCallable | None = None,
    other_optimizer: OtherOptimizerCallable | None = None,
    schedule: Schedule | None = None,
    parameter_rules: Sequence[ParameterRule] = (),
) -> OptimizerLRScheduler:
    """Build the optimizer of :class:`MuonMixin` for any LightningModule, to return from ``configure_optimizers``.

    Use it to keep your own scheduler, or if your ``configure_optimizers`` does more::

        def configure_optimizers(self):
            optimizer = configure_hybrid_optimizer(self, matrix_optimizer=partial(Muon, lr=1e-3))
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10)}

    Under a Trainer it also adds callbacks. They print the partition if the Trainer shows its model summary, end the
    schedule with the run, report the settings that a resumed run uses, and train parameters that are added later.

    Args:
        module: the module to train.
        matrix_optimizer: called with the param groups of the matrices; None for Muon.
        other_optimizer: called with the other param groups; None for AdamW.
        schedule: multiplier of all learning rates; None to leave them constant.
        parameter_rules: rules that override the automatic partition: group, layout and options of parameters.

    Returns:
        The :class:`HybridOptimizer`; with a schedule, Lightning's dict with ``"optimizer"`` and ``"lr_scheduler"``.

    Raises:
        TypeError: if ``module`` is not a LightningModule, an optimizer is given instead of a class or function that
            builds one, or ``schedule`` is not a ``Schedule``.
        ValueError: if there is a schedule but the run has no known length; the message says to set ``max_steps``.
        RuntimeError: if there is a schedule but no Trainer, if the strategy shards matrices into flat pieces, if an
            optimizer differentiates the gradients but the Trainer makes their derivatives wrong, or if a
            ``LearningRateFinder`` would set param groups with different learning rates to a single one.
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
    """Raise ``TypeError`` unless the optimizer settings are callable and the schedule is a ``Schedule``.

    Args:
        matrix_optimizer: the setting, or None.
        other_optimizer: likewise.
        schedule: likewise.
        where: prefix of the setting's name in the message, e.g. ``"Net."``.
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

    A module without a Trainer, or one that trains without an optimizer of this package, is partitioned with
    ``parameter_rules``.
    """
    trainer = attached_trainer(module)
    try:
        partition, _ = partition_of(module, trainer.optimizers if trainer is not None else (), parameter_rules)
        checkpoint[LAYOUTS_KEY] = partition.layouts()
    except (TypeError, ValueError) as error:  # no reason to lose a checkpoint
        rank_zero_warn(f"The checkpoint does not say how matrices are read: {error}")


def watch_parameters(trainer: Trainer, optimizer: HybridOptimizer, rules: Sequence[ParameterRule] = ()) -> None:
    """Train parameters that are added later, and warn of those in no optimizer; see :class:`LateParameters`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [LateParameters(optimizer, rules), *(c for c in callbacks if type(c) is not LateParameters)]


def _made(module: LightningModule, configured: OptimizerLRScheduler) -> OptimizerLRScheduler:
    """Record what is returned to the running ``configure_optimizers``, if the mixin checks that method."""
    if REACHED in vars(module):
        vars(module)[REACHED] = configured
    return configured


def _scheduler(schedule: Schedule, optimizer: HybridOptimizer, trainer: Trainer) -> ScheduledLR:
    steps = steps_of_run(trainer)
    if share_of_time(trainer) is not None and steps == float("inf"):
        return ScheduledLR(optimizer, schedule, steps)  # the clock sets the length during the run
    return schedule.scheduler(optimizer, 1 if steps == 0 else steps)  # a fit of 0 steps needs no learning rate


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
            "gradient_clip_algorithm='value' changes the direction of a matrix's gradient, on which Muon's update "
            "depends. Use gradient_clip_algorithm='norm', which keeps the direction."
        )


def _check_rate_finder(trainer: Trainer, optimizer: HybridOptimizer) -> None:
    """Raise if a search over one rate covers groups of different rates; warn if the found rate is not used."""
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
                f"Tuner.lr_find writes the learning rate that it finds into {type(module).__name__}.{name}, but no "
                "param group reads it there: later fits do not use it. Pass its suggestion() as lr to matrix_optimizer "
                "and other_optimizer, or use the callback LearningRateFinder, which sets the rate of the running fit."
            )


def _warn_of_averaging_rate(trainer: Trainer, optimizer: HybridOptimizer) -> None:
    """Warn if StochasticWeightAveraging anneals groups of different rates to a single one."""
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
    """Add the callbacks that a hybrid optimizer needs; replace those of an earlier fit."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = (ScheduleLength, ResumedSettings)
    callbacks[:] = [callback for callback in callbacks if type(callback) not in ours and not _of_earlier_fit(callback)]
    # First, so that monitors of the learning rate see the rate of the next step.
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
    """Callbacks that optimizers of other packages need; most need none."""
    needed: list[type[CreateGraph] | type[OptimizerModes]] = []
    children = optimizer.optimizers.values()
    if any(map(has_modes, children)):
        needed.append(OptimizerModes)
    second_order = [type(child).__name__ for child in children if differentiates_gradients(child)]
    if second_order:
        if trainer.world_size > 1 or getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise RuntimeError(
                f"{second_order[0]} differentiates the gradients, but gradients that are averaged over processes or "
                "scaled by a gradient scaler have wrong derivatives. Train in one process, without "
                "precision='16-mixed'."
            )
        needed.append(CreateGraph)
    return needed
