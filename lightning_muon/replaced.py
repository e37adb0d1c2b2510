"""Replaces the ``configure_optimizers`` of a module by a hybrid optimizer, and warns of what is no longer used."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.configure import configure_hybrid_optimizer
from lightning_muon.optim import HybridOptimizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

_PLAIN = (bool, int, float, str)


def own_method(cls: type, after: type | None = None) -> Callable[..., Any] | None:
    """Return the ``configure_optimizers`` of the module's author; None if there is only Lightning's empty one.

    Args:
        cls: the module's class.
        after: search only the classes after this one in the method resolution order.
    """
    mro = cls.__mro__ if after is None else cls.__mro__[cls.__mro__.index(after) + 1 :]
    owner = next((base for base in mro if "configure_optimizers" in vars(base)), None)
    if owner is None or owner.__name__ == "LightningModule":
        return None
    return as_function(owner, "configure_optimizers")


def as_function(owner: type, name: str) -> Callable[[Any], Any]:
    """Return a method of a class, which may be a partialmethod or a property, as a function of the instance."""
    method = vars(owner)[name]

    def call(instance: Any) -> Any:
        return (method.__get__(instance, type(instance)) if hasattr(method, "__get__") else method)()

    function = getattr(method, "func", method)
    if inspect.isfunction(function):
        functools.update_wrapper(call, function)
    call.__qualname__ = f"{owner.__qualname__}.{name}"
    return call


def optimizers_in(configured: Any) -> tuple[list[Optimizer], list[Any]]:
    """Return the optimizers and schedulers in the result of ``configure_optimizers``, in any form Lightning accepts."""
    if isinstance(configured, Optimizer):
        return [configured], []
    if isinstance(configured, Mapping):
        configured = list(configured.values())
    if isinstance(configured, (list, tuple)):
        found = [optimizers_in(part) for part in configured]
        return [o for optimizers, _ in found for o in optimizers], [s for _, schedulers in found for s in schedulers]
    if callable(getattr(configured, "step", None)):
        return [], [configured]
    return [], []


@dataclass(frozen=True)
class Replacement:
    """Words for the messages about a replaced ``configure_optimizers``.

    Args:
        by: what replaces it, e.g. ``"UseMuon"``.
        settings: names of the settings to use instead.
        keep: how to keep your own scheduler.
    """

    by: str
    settings: str
    keep: str


def configure_in_place_of(
    method: Callable[..., Any] | None, module: LightningModule, replacement: Replacement, **settings: Any
) -> OptimizerLRScheduler:
    """Call :func:`configure_hybrid_optimizer` instead of ``method``, and warn of what ``method`` would have made.

    A method that makes a hybrid optimizer itself is not replaced.

    Args:
        method: the unbound function to replace; None if there is none.
        module: the module.
        replacement: the words of the warning.
        **settings: of :func:`configure_hybrid_optimizer`.

    Raises:
        RuntimeError: if the method cannot be replaced; see :func:`look_at`.
    """
    if method is None:
        return configure_hybrid_optimizer(module, **settings)
    own = look_at(module, method, by=replacement.by)  # first, as it may freeze layers
    if own.hybrid is not None:
        given = [name for name, value in settings.items() if value]
        if given:
            raise RuntimeError(
                f"{own.name} makes a HybridOptimizer itself, and that one is used: {' and '.join(given)} of "
                f"{replacement.by} would have no effect. Give them in {own.name}."
            )
        return own.hybrid
    configured = configure_hybrid_optimizer(module, **settings)
    rank_zero_warn(replacement_notice(own, configured, replacement))
    return configured


@dataclass(frozen=True)
class OwnOptimizers:
    """What a replaced ``configure_optimizers`` makes.

    Args:
        name: name of the method.
        described: clause that names what is not used: optimizers with their learning rates, and schedulers.
        reads: hyperparameters and attributes that its code reads, with their values.
        left_out: names of the trainable parameters that none of its optimizers has.
        hybrid: the return value if it has a hybrid optimizer; None otherwise.
    """

    name: str
    described: str
    reads: list[str]
    left_out: list[str]
    hybrid: OptimizerLRScheduler = None


def look_at(module: LightningModule, method: Callable[..., Any], by: str) -> OwnOptimizers:
    """Call the ``configure_optimizers`` to be replaced once, and describe what it makes.

    Args:
        module: the module.
        method: the unbound function.
        by: what replaces it, e.g. ``"UseMuon"``.

    Raises:
        RuntimeError: if it cannot be replaced: it makes several optimizers, a scheduler that the module steps itself,
            or an optimizer that has less than half of the trainable elements.
    """
    name = method.__qualname__
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            returned = method(module)
        optimizers, schedulers = optimizers_in(returned)
    except Exception as error:  # its result is not used, so that any error may be ignored
        described = f"its optimizer, learning rate and scheduler (it raises {type(error).__name__}) are not used"
        return OwnOptimizers(name, described, _settings_read(module, method), [])
    if any(isinstance(optimizer, HybridOptimizer) for optimizer in optimizers):
        return OwnOptimizers(name, "", [], [], returned)
    trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    held = {parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [(n, p) for n, p in trainable if optimizers and p not in held]
    _check_replaceable(module, name, by, optimizers, schedulers)
    _check_coverage(name, by, optimizers, left_out, sum(p.numel() for _, p in trainable))
    parts = [_describe(optimizer) for optimizer in optimizers]
    parts += [f"the scheduler {type(scheduler).__name__}" for scheduler in schedulers]
    described = (
        f"its {' and '.join(parts)} {'are' if len(parts) > 1 else 'is'} not used" if parts else "it makes no optimizer"
    )
    return OwnOptimizers(name, described, _settings_read(module, method), [n for n, _ in left_out])


def _check_replaceable(
    module: LightningModule, name: str, by: str, optimizers: Sequence[Optimizer], schedulers: Sequence[object]
) -> None:
    if len(optimizers) > 1:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise RuntimeError(
            f"{name} returns {len(optimizers)} optimizers ({kinds}), which {type(module).__name__} steps one by one; "
            f"{by} has one for all parameters. Return one HybridOptimizer for each part from configure_optimizers "
            "instead, e.g. [HybridOptimizer.from_module(self.generator), "
            f"HybridOptimizer.from_module(self.discriminator)], and leave out {by}."
        )
    if schedulers and not module.automatic_optimization:
        raise RuntimeError(
            f"{name} returns the scheduler {type(schedulers[0]).__name__}, which {type(module).__name__} steps "
            f"itself (manual optimization); with {by} there would be none to step. Turn the scheduler off in the "
            "module's settings, or return it from configure_optimizers with "
            f"lightning_muon.configure_hybrid_optimizer(self, ...), and leave out {by}."
        )


def _check_coverage(
    name: str, by: str, optimizers: Sequence[Optimizer], left_out: Sequence[tuple[str, Tensor]], total: int
) -> None:
    """Raise if an optimizer has less than half of the elements: the rest may be meant to stay as it is."""
    missing = sum(parameter.numel() for _, parameter in left_out)
    if 2 * missing > total:
        raise RuntimeError(
            f"{name} gives {type(optimizers[0]).__name__} {total - missing} of {total} trainable elements and leaves "
            f"out e.g. {left_out[0][0]}. {by} would train all of them. To keep the others as they are, freeze them "
            "with requires_grad_(False). If the module trains them by other means (pyro, its own optimizers), leave "
            f"out {by}: it cannot replace those."
        )


def replacement_notice(own: OwnOptimizers, configured: Any, replacement: Replacement) -> str:
    """Return the warning: what is not used, what is used in its place, and what to write instead."""
    by = replacement.by
    no_effect = f" It reads {', '.join(own.reads)}, without an effect on the optimizer now." if own.reads else ""
    shown = ", ".join(own.left_out[:4]) + (f" and {len(own.left_out) - 4} more" if len(own.left_out) > 4 else "")
    trained = (
        f" It leaves out {shown}, which {by} trains: freeze them with requires_grad_(False) if they are to stay."
        if own.left_out
        else ""
    )
    return (
        f"{by} replaces {own.name}: {own.described}.{no_effect}{trained} {_used(configured)} Set "
        f"{replacement.settings} instead; to keep a scheduler of your own, {replacement.keep}."
    )


def _describe(optimizer: Optimizer) -> str:
    shown = []
    for key in ("lr", "weight_decay"):
        groups = optimizer.param_groups or [optimizer.defaults]  # all its parameters are frozen
        values = [group.get(f"initial_{key}", group.get(key)) for group in groups]
        if all(isinstance(value, (int, float)) for value in values) and (key == "lr" or any(values)):
            shown.append(f"{key}={' and '.join(dict.fromkeys(f'{value:g}' for value in values))}")
    return f"{type(optimizer).__name__}({', '.join(shown)})"


def _used(configured: Any) -> str:
    (hybrid, *_), schedulers = optimizers_in(configured)
    assert isinstance(hybrid, HybridOptimizer)
    children = " and ".join(f"{_describe(child)} for {name!r}" for name, child in hybrid.optimizers.items())
    schedule = ", ".join(repr(getattr(scheduler, "schedule", scheduler)) for scheduler in schedulers)
    return f"The fit uses {children}, {schedule or 'at constant learning rates'}."


def _settings_read(module: LightningModule, function: Callable[..., Any]) -> list[str]:
    """Hyperparameters and plain attributes of the module that the code of a method names."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return []
    names = dict.fromkeys(code.co_names)
    if "hparams" in names:  # self.hparams["lr"]
        names |= dict.fromkeys(constant for constant in code.co_consts if isinstance(constant, str))
    held = {**{key: value for key, value in vars(module).items() if not key.startswith("_")}, **module.hparams}
    return [f"{name}={held[name]}" for name in names if name in held and isinstance(held[name], _PLAIN)]
