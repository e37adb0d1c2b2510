"""MuonMixin: the base class that gives a LightningModule its optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import AdamW

from lightning_muon.callbacks.create_graph import CreateGraph
from lightning_muon.callbacks.optimizer_modes import OptimizerModes
from lightning_muon.optim import HybridOptimizer, MatrixOptimizer, Muon
from lightning_muon.optim.foreign import differentiates_gradients, has_modes
from lightning_muon.partition import ParameterRule, Partition, partition_parameters
from lightning_muon.partition.roles import LAYOUTS_KEY
from lightning_muon.schedules import Schedule

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    _ModuleMethods = LightningModule  # what the mixin may call on itself
else:
    _ModuleMethods = object

# On a command line jsonargparse takes arguments that are given without a class for those of the first return type: of
# Muon and AdamW. The default stays None, as another class would inherit the arguments of a default. Optimizers of this
# package come before all others, so that the bare name Muon is not taken for torch.optim.Muon.
MatrixOptimizerCallable: TypeAlias = (
    Callable[[Iterable[Any]], Muon] | Callable[[Iterable[Any]], MatrixOptimizer] | OptimizerCallable
)
OtherOptimizerCallable: TypeAlias = Callable[[Iterable[Any]], AdamW] | OptimizerCallable


class MuonMixin(_ModuleMethods):
    """Base class, listed before ``LightningModule``, that trains hidden matrices with Muon and the rest with AdamW.

    It defines ``configure_optimizers``; nothing else in the module changes. Modules of ``lightning.pytorch`` and of
    ``pytorch_lightning`` can have it. Hand ``**kwargs`` on to ``super().__init__`` and the settings below become
    arguments of your module, in Python, on the command line and in YAML.

    In a module constructed from Python, ``save_hyperparameters`` leaves these four settings out of ``hparams`` unless
    they are plain data, because checkpoints hold no code: give them again to ``load_from_checkpoint`` if the loaded
    module is to be trained further. A command line stores them as configuration and restores them by itself.

    Args:
        *args: handed on to the next class.
        matrix_optimizer: called with the param groups of the matrices: a class or ``functools.partial(Muon, lr=1e-3)``.
            Any ``torch.optim.Optimizer`` will do. None for :class:`lightning_muon.Muon`.
        other_optimizer: called with the param groups of all other parameters; None for ``torch.optim.AdamW``.
        schedule: multiplier of all learning rates, e.g. ``Cosine(warmup=0.02)``; None to leave them constant.
        parameter_rules: where parameters go and with which options, on top of what is found by itself.
        **kwargs: handed on to the next class.

    Raises:
        TypeError: at class definition, if a ``LightningModule`` stands before the mixin among the bases. At
            construction, if an optimizer is given instead of what makes one, or the schedule is not a ``Schedule``.

    Example::

        class Net(MuonMixin, L.LightningModule):
            def __init__(self, width: int = 64, **kwargs):
                super().__init__(**kwargs)
                self.save_hyperparameters()
                self.layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))

        Net(matrix_optimizer=partial(Muon, lr=1e-3), schedule=Cosine(warmup=0.02))
    """

    # Class-level defaults serve modules that never call MuonMixin.__init__.
    matrix_optimizer: MatrixOptimizerCallable | None = None
    other_optimizer: OtherOptimizerCallable | None = None
    schedule: Schedule | None = None
    parameter_rules: Sequence[ParameterRule] = ()

    def __init__(
        self,
        *args: Any,
        matrix_optimizer: MatrixOptimizerCallable | None = None,
        other_optimizer: OtherOptimizerCallable | None = None,
        schedule: Schedule | None = None,
        parameter_rules: list[ParameterRule] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _check_settings(matrix_optimizer, other_optimizer, schedule)
        self.matrix_optimizer = matrix_optimizer
        self.other_optimizer = other_optimizer
        self.schedule = schedule
        self.parameter_rules = list(parameter_rules or ())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(MuonMixin)]
        if any(_is_lightning_module(base) for base in before):
            bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not MuonMixin)
            raise TypeError(
                f"MuonMixin must stand before LightningModule among the bases of {cls.__name__}, or its settings and "
                f"configure_optimizers are never reached. Write `class {cls.__name__}(MuonMixin, {bases})`."
            )

    def partition(self) -> Partition:
        """Which optimizer takes each parameter of this module, and why; its ``table()`` prints with Rich.

        A module that is built in ``configure_model`` has its parameters only after that.
        """
        return partition_parameters(self, self.parameter_rules)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One :class:`lightning_muon.HybridOptimizer`, and its scheduler if there is a schedule.

        Raises:
            ValueError: if the schedule needs the length of a run that has none; names ``max_steps``.
            RuntimeError: if there is a schedule but no Trainer to say how long the run is, or if the strategy shards
                matrices into flat pieces.
        """
        return configure_hybrid_optimizer(
            self, self.matrix_optimizer, self.other_optimizer, self.schedule, self.parameter_rules
        )

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Nothing to add; the first hook of a run, used to refuse an optimizer that would replace this one unseen."""
        if "configure_optimizers" in vars(self):
            raise RuntimeError(
                f"{type(self).__name__}.configure_optimizers of MuonMixin was replaced on the instance, as "
                "LightningCLI does for --optimizer. Leave out --optimizer and --lr_scheduler, and set "
                "model.matrix_optimizer, model.other_optimizer and model.schedule. MuonCLI and "
                "LightningCLI(auto_configure_optimizers=False) do without these options."
            )
        return super().configure_callbacks()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds how the matrices are read, under ``"matrix_layouts"``, for ``lightning-muon spectra``."""
        super().on_save_checkpoint(checkpoint)
        add_matrix_layouts(checkpoint, self, self.parameter_rules)

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """As in Lightning, less those settings of the mixin that are objects, which no checkpoint can hold."""
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
        for name in ("matrix_optimizer", "other_optimizer", "schedule", "parameter_rules"):
            if not _is_plain(self.hparams.get(name)):
                del self.hparams[name]
                vars(self)["_hparams_initial"].pop(name, None)


def configure_hybrid_optimizer(
    module: LightningModule,
    matrix_optimizer: MatrixOptimizerCallable | None = None,
    other_optimizer: OtherOptimizerCallable | None = None,
    schedule: Schedule | None = None,
    parameter_rules: Sequence[ParameterRule] = (),
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` of any LightningModule may return to train it as :class:`MuonMixin` does.

    Args:
        module: the module to train.
        matrix_optimizer: called with the param groups of the matrices; None for Muon.
        other_optimizer: called with the other param groups; None for AdamW.
        schedule: multiplier of all learning rates; None to leave them constant.
        parameter_rules: where parameters go and with which options, on top of what is found by itself.

    Raises:
        ValueError: if the schedule needs the length of a run that has none; names ``max_steps``.
        RuntimeError: if there is a schedule but no Trainer, if the strategy shards matrices into flat pieces, or if
            gradients can not be differentiated where an optimizer does so.
    """
    trainer = _attached_trainer(module)
    if trainer is not None:
        _check_strategy(trainer)
        _warn_if_clipped_by_value(trainer)
    optimizer = HybridOptimizer.from_module(module, matrix_optimizer, other_optimizer, parameter_rules)
    if trainer is not None:
        _add_callbacks(trainer, optimizer)
    if schedule is None:
        return optimizer
    if trainer is None:
        raise RuntimeError(
            f"{type(module).__name__} has a schedule but no Trainer that knows the length of the run. Outside a "
            "Trainer, construct the module without schedule and use schedule.scheduler(optimizer, total_steps)."
        )
    scheduler = schedule.scheduler(optimizer, trainer.estimated_stepping_batches)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}


def add_matrix_layouts(
    checkpoint: dict[str, Any], module: LightningModule, parameter_rules: Sequence[ParameterRule] = ()
) -> None:
    """Write into a checkpoint how the matrices of a module are read (:meth:`Partition.layouts`)."""
    try:
        checkpoint[LAYOUTS_KEY] = partition_parameters(module, parameter_rules).layouts()
    except (TypeError, ValueError) as error:  # no reason to lose a checkpoint
        rank_zero_warn(f"The checkpoint does not say how matrices are read: {error}")


def _is_lightning_module(cls: type) -> bool:
    return cls.__name__ == "LightningModule" and cls.__module__.startswith(("lightning.pytorch.", "pytorch_lightning."))


def _check_settings(matrix_optimizer: object, other_optimizer: object, schedule: object) -> None:
    for name, value in (("matrix_optimizer", matrix_optimizer), ("other_optimizer", other_optimizer)):
        if value is not None and not callable(value):
            raise TypeError(
                f"{name} must be a class or function that is called with param groups, e.g. functools.partial(Muon, "
                f"lr=1e-3), got an object of type {type(value).__name__}."
            )
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a lightning_muon.schedules.Schedule, e.g. Cosine(warmup=0.02), got {schedule!r}."
        )


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is made of what a checkpoint loads with ``weights_only=True`` and YAML shows as text."""
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, bool, int, float)


def _attached_trainer(module: LightningModule) -> Trainer | None:
    try:
        trainer = module.trainer
    except RuntimeError:  # no Trainer
        return None
    return trainer if hasattr(trainer, "max_steps") else None  # Fabric stands in for a Trainer


def _check_strategy(trainer: Trainer) -> None:
    for name in (cls.__name__ for cls in type(trainer.strategy).__mro__):
        if name in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise RuntimeError(
                f"{name} flattens matrices into one-dimensional shards, so that none is left to orthogonalize. Use "
                "strategy='ddp', which keeps them whole."
            )


def _add_callbacks(trainer: Trainer, optimizer: HybridOptimizer) -> None:
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
    present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    trainer.callbacks.extend(kind() for kind in needed if kind not in present)  # type: ignore[attr-defined]


def _warn_if_clipped_by_value(trainer: Trainer) -> None:
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_algorithm == "value":
        rank_zero_warn(
            "gradient_clip_algorithm='value' changes the direction of a matrix's gradient, which is what Muon goes by. "
            "gradient_clip_algorithm='norm' keeps it."
        )
