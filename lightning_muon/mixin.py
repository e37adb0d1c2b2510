"""MuonMixin: the base class that gives a LightningModule its optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_muon.configure import (
    REACHED,
    MatrixOptimizerCallable,
    OtherOptimizerCallable,
    add_matrix_layouts,
    attached_trainer,
    check_settings,
    watch_parameters,
)
from lightning_muon.optim import HybridOptimizer
from lightning_muon.partition import ParameterRule, Partition, partition_parameters
from lightning_muon.replaced import Replacement, as_function, configure_in_place_of, optimizers_in, own_method
from lightning_muon.schedules import Schedule
from lightning_muon.settings import (
    SETTINGS,
    check_names,
    check_setting,
    is_configuration,
    is_plain,
    name_taken,
    own_arguments,
    settings_made_of,
)

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    _ModuleMethods = LightningModule  # what the mixin may call on itself
else:
    _ModuleMethods = object


class MuonMixin(_ModuleMethods):
    """Base class, listed before ``LightningModule``, that trains hidden matrices with Muon and the rest with AdamW.

    It defines ``configure_optimizers``; nothing else in the module changes. It works with modules of
    ``lightning.pytorch`` and of ``pytorch_lightning``. Pass ``**kwargs`` to ``super().__init__``, and the settings
    below become arguments of your module, in Python, on the command line and in YAML.

    The mixin's ``configure_optimizers`` overrides that of a base class. A warning at the start of the fit then names
    the optimizer, learning rate and scheduler that are not used. A ``configure_optimizers`` in the class itself
    overrides the mixin's, and has to call ``super().configure_optimizers()``: write one to keep your own scheduler.
    See also :func:`lightning_muon.configure_hybrid_optimizer`.

    Checkpoints hold no code, so a module constructed in Python does not save these settings: to train the loaded
    module further, pass them to ``load_from_checkpoint`` again. A command line saves its settings as configuration,
    and the loaded module has them. In both cases a parent class without the mixin can load the checkpoint.

    Args:
        *args: passed to the next class.
        matrix_optimizer: called with the param groups of the matrices: a class or ``functools.partial(Muon, lr=1e-3)``.
            Any ``torch.optim.Optimizer`` works. None for :class:`lightning_muon.Muon`.
        other_optimizer: called with the param groups of all other parameters; None for ``torch.optim.AdamW``.
        schedule: multiplier of all learning rates, e.g. ``Cosine(warmup=0.02)``; None to leave them constant.
        parameter_rules: rules that override the automatic partition: group, layout and options of parameters.
        **kwargs: passed to the next class.

    Raises:
        TypeError: at class definition, if a ``LightningModule`` comes before the mixin among the bases. At
            construction, if an optimizer is given instead of a class or function that builds one, or ``schedule`` is
            not a ``Schedule``.
        AttributeError: if the module uses the name of a setting for something else.
        RuntimeError: at the start of a fit, if a ``configure_optimizers`` of the class never calls the mixin's.

    Example::

        >>> class Net(MuonMixin, L.LightningModule):
        ...     def __init__(self, width: int = 64, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.save_hyperparameters()
        ...         self.layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        >>> net = Net(matrix_optimizer=partial(Muon, lr=1e-3), schedule=Cosine(warmup=0.02))
        >>> [entry.name for entry in net.partition() if entry.group == "matrix"]
        ['layers.0.weight']
    """

    # Class-level defaults also serve modules that never call MuonMixin.__init__.
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
        # A subclass may set defaults for all its instances: only arguments that are given override them.
        if matrix_optimizer is not None:
            self.matrix_optimizer = matrix_optimizer
        if other_optimizer is not None:
            self.other_optimizer = other_optimizer
        if schedule is not None:
            self.schedule = schedule
        if parameter_rules is not None:
            self.parameter_rules = list(parameter_rules)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(MuonMixin)]
        if any(_is_lightning_module(base) for base in before):
            bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not MuonMixin)
            raise TypeError(
                f"MuonMixin must come before LightningModule among the bases of {cls.__name__}, or its settings and "
                f"configure_optimizers are never reached. Write `class {cls.__name__}(MuonMixin, {bases})`."
            )
        check_names(cls, MuonMixin)
        _watch_methods(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            check_setting(type(self).__name__, name, value)
        super().__setattr__(name, value)
        if name == "configure_optimizers" and attached_trainer(self) is not None:  # as setup() may do
            _check_not_replaced(self)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in torch; the names of the mixin's settings are reserved."""
        if name in SETTINGS:
            raise name_taken(type(self).__name__, name, "a submodule")
        super().add_module(name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; the names of the mixin's settings are reserved."""
        if name in SETTINGS:
            raise name_taken(type(self).__name__, name, "a parameter")
        super().register_parameter(name, param)

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As in torch; the names of the mixin's settings are reserved."""
        if name in SETTINGS:
            raise name_taken(type(self).__name__, name, "a buffer")
        super().register_buffer(name, *args, **kwargs)

    def partition(self) -> Partition:
        """Return which optimizer takes each parameter of this module, and why; ``table()`` prints with Rich.

        If ``configure_model`` builds the module, call it first.
        """
        return partition_parameters(self, self.parameter_rules)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build one :class:`lightning_muon.HybridOptimizer`, and its scheduler if there is a schedule.

        Raises:
            ValueError: if there is a schedule but the run has no known length; the message says to set ``max_steps``.
            RuntimeError: if there is a schedule but no Trainer, which knows the length of the run, or if the strategy
                shards matrices into flat pieces.
        """
        check_settings(self.matrix_optimizer, self.other_optimizer, self.schedule, f"{type(self).__name__}.")
        warn_of_inner_settings(self)
        _check_passed_on(self)
        keep = f"return it with the optimizer of super().configure_optimizers() from a method of {type(self).__name__}"
        return configure_in_place_of(
            own_method(type(self), after=MuonMixin) if attached_trainer(self) is not None else None,
            self,
            Replacement("MuonMixin", "matrix_optimizer, other_optimizer and schedule", keep),
            **{name: getattr(self, name) for name in SETTINGS},
        )

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Adds no callback; as the first hook of a run, raises if another optimizer silently replaced the mixin's."""
        _watch_methods(type(self))  # the class may have got a method since it was defined
        _check_not_replaced(self)
        return super().configure_callbacks()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the layouts of the matrices under ``"matrix_layouts"``, for ``lightning-muon spectra``.

        Settings among the hyperparameters move to ``"muon_settings"``, so that a parent class without the mixin
        can load the checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        add_matrix_layouts(checkpoint, self)
        hparams = checkpoint.get("hyper_parameters")
        if isinstance(hparams, dict):
            own = own_arguments(type(self), MuonMixin)
            ours = [n for n in SETTINGS if n in hparams and n not in own and is_configuration(hparams[n])]
            if ours:
                checkpoint[_SAVED_SETTINGS] = {name: hparams.pop(name) for name in ours}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes settings that were not given to this module from the checkpoint; in a fit, a message names them."""
        super().on_load_checkpoint(checkpoint)
        saved = {k: v for k, v in checkpoint.get(_SAVED_SETTINGS, {}).items() if not getattr(self, k)}
        for name, value in (settings_made_of(saved) if saved else {}).items():
            setattr(self, name, value)
        if saved and attached_trainer(self) is not None:
            rank_zero_info(f"These settings were not given and come from the checkpoint: {', '.join(sorted(saved))}.")

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """As in Lightning, without the mixin's settings that were not given or are objects: checkpoints hold none."""
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
        own = own_arguments(type(self), MuonMixin)
        for name in SETTINGS:
            if name not in self.hparams:
                continue
            value = self.hparams[name]
            if name in own and isinstance(value, (Schedule, functools.partial)):
                vars(self).setdefault(_TAKEN, set()).add(name)
            if not is_plain(value) or (name not in own and not value):
                del self.hparams[name]
                vars(self)["_hparams_initial"].pop(name, None)


_TAKEN = "_muon_mixin_taken"
"""Attribute of a module: the names of settings that are arguments of its own constructor."""

_SAVED_SETTINGS = "muon_settings"
"""Key in a checkpoint of the settings from a command line, as configuration."""


def _checked_configure_optimizers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a ``configure_optimizers`` that overrides the mixin's, to check that it returns the mixin's optimizer."""

    @functools.wraps(method)
    def configure_optimizers(self: MuonMixin) -> Any:
        outermost = REACHED not in vars(self)
        vars(self)[REACHED] = None
        try:
            configured = method(self)
            made = vars(self)[REACHED]
        except (AttributeError, TypeError) as error:
            if isinstance(vars(self)[REACHED], dict):  # the method took this dict for an optimizer
                raise RuntimeError(
                    f"{method.__qualname__} failed ({error}). {type(self).__name__} has schedule={self.schedule!r}, so "
                    "that super().configure_optimizers() returns a dict of the optimizer and its scheduler. Leave out "
                    "schedule if configure_optimizers adds its own scheduler."
                ) from error
            raise
        finally:
            if outermost:
                del vars(self)[REACHED]
        if made is None:
            _check_own(self, method, configured)
        else:
            _check_returned(self, method, made, configured)
        return configured

    configure_optimizers._checked_by_muon_mixin = True  # type: ignore[attr-defined]
    return configure_optimizers


def _watch_methods(cls: type[MuonMixin]) -> None:
    """Wrap methods that override the mixin's, so that they are checked even if they do not call ``super()``."""
    before = cls.__mro__[: cls.__mro__.index(MuonMixin)]
    for name, checked in (
        ("configure_optimizers", _checked_configure_optimizers),
        ("configure_callbacks", _checked_configure_callbacks),
    ):
        owner = next((base for base in before if name in vars(base)), None)
        if owner is not None and not hasattr(vars(owner)[name], "_checked_by_muon_mixin"):
            setattr(cls, name, checked(as_function(owner, name)))


def _checked_configure_callbacks(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a ``configure_callbacks`` that overrides the mixin's, to check that no other optimizer replaced it."""

    @functools.wraps(method)
    def configure_callbacks(self: MuonMixin) -> Any:
        _check_not_replaced(self)
        return method(self)

    configure_callbacks._checked_by_muon_mixin = True  # type: ignore[attr-defined]
    return configure_callbacks


def _check_own(module: MuonMixin, method: Callable[..., Any], configured: Any) -> None:
    """Raise if a ``configure_optimizers`` never called the mixin's, unless it returned a hybrid optimizer."""
    given = [name for name in SETTINGS if getattr(module, name)]
    optimizers, _ = optimizers_in(configured)
    hybrids = [optimizer for optimizer in optimizers if isinstance(optimizer, HybridOptimizer)]
    trainer = attached_trainer(module)
    if hybrids and not given:
        if trainer is not None:
            watch_parameters(trainer, hybrids[0])
        return
    names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "nothing"
    unused = f"{' and '.join(given)} would have no effect" if given else "no matrix is trained with Muon"
    raise RuntimeError(
        f"{method.__qualname__} returns {names} and never calls MuonMixin's, so that {unused}. Take the optimizer from "
        "`super().configure_optimizers()` and return it, with your scheduler if you have one; or remove "
        f"configure_optimizers. To train without Muon, leave MuonMixin out of the bases of {type(module).__name__}."
    )


def _check_returned(module: MuonMixin, method: Callable[..., Any], made: Any, configured: Any) -> None:
    """Raise if a ``configure_optimizers`` called the mixin's and does not return that optimizer."""
    (hybrid, *_), _ = optimizers_in(made)
    optimizers, _ = optimizers_in(configured)
    groups = {id(group) for optimizer in optimizers for group in optimizer.param_groups}
    if optimizers and groups.isdisjoint(map(id, hybrid.param_groups)):  # a wrapper has the same groups
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise RuntimeError(
            f"{method.__qualname__} calls MuonMixin's and returns {names} instead of its optimizer, so that no matrix "
            "is trained with Muon. Return the optimizer of `super().configure_optimizers()`; or, to train without "
            f"Muon, leave MuonMixin out of the bases of {type(module).__name__}."
        )


def _check_not_replaced(module: MuonMixin) -> None:
    if "configure_optimizers" in vars(module):
        raise RuntimeError(
            f"{type(module).__name__}.configure_optimizers of MuonMixin was replaced on the instance, as "
            "LightningCLI does for --optimizer. Leave out --optimizer and --lr_scheduler, and set "
            "model.matrix_optimizer, model.other_optimizer and model.schedule. MuonCLI and "
            "LightningCLI(auto_configure_optimizers=False) do not have these options."
        )


def _check_passed_on(module: MuonMixin) -> None:
    lost = [name for name in vars(module).get(_TAKEN, ()) if not getattr(module, name)]
    if lost:
        raise RuntimeError(
            f"{type(module).__name__}.__init__ takes {lost[0]} itself and does not pass it to super().__init__, so "
            "that MuonMixin never gets it. Pass it on, or give the argument another name."
        )


def warn_of_inner_settings(module: nn.Module) -> None:
    """Warn of settings given to mixin modules inside ``module``: the optimizer of ``module`` does not use them."""
    for name, part in module.named_modules():
        given = [key for key in SETTINGS if part is not module and isinstance(part, MuonMixin) and getattr(part, key)]
        if given:
            rank_zero_warn(
                f"The inner module {name!r} ({type(part).__name__}) has settings that are not used: "
                f"{', '.join(given)}. Only those of {type(module).__name__} are used. Give them there; rules "
                f"select by name, e.g. ParameterRule(pattern='{name}.*', options={{'lr': 1e-3}})."
            )


def _is_lightning_module(cls: type) -> bool:
    return cls.__name__ == "LightningModule" and cls.__module__.startswith(("lightning.pytorch.", "pytorch_lightning."))
