"""What is said of a ``configure_optimizers`` that a hybrid optimizer takes the place of."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_muon.optim import HybridOptimizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_PLAIN = (bool, int, float, str)


def own_method(cls: type, after: type | None = None) -> Callable[..., Any] | None:
    """The ``configure_optimizers`` that a module's author wrote; None where there is only Lightning's empty one.

    Args:
        cls: the module's class.
        after: look only behind this class in the order of calls.
    """
    mro = cls.__mro__ if after is None else cls.__mro__[cls.__mro__.index(after) + 1 :]
    owner = next((base for base in mro if "configure_optimizers" in vars(base)), None)
    if owner is None or owner.__name__ == "LightningModule":
        return None
    method: Callable[..., Any] = vars(owner)["configure_optimizers"]
    return method


def optimizers_in(configured: Any) -> tuple[list[Optimizer], list[Any]]:
    """Optimizers and schedulers in what ``configure_optimizers`` returned, in any of the forms that Lightning takes."""
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


def replacement_notice(
    module: LightningModule, method: Callable[[], Any], configured: Any, *, by: str, settings: str, keep: str
) -> str:
    """What is not used, what is, and what to write instead.

    The method that is replaced is called once, to say what it would have returned.

    Args:
        module: the module.
        method: its own ``configure_optimizers``, bound.
        configured: what is used in its place.
        by: what takes its place, e.g. ``"UseMuon"``.
        settings: names of the settings that count now.
        keep: how to keep a scheduler of one's own.

    Raises:
        RuntimeError: if the method returns several optimizers, each of which the module steps by itself.
    """
    function = getattr(method, "func", method)
    name = getattr(function, "__qualname__", "configure_optimizers")
    unused, optimizers = _unused(method)
    if len(optimizers) > 1:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise RuntimeError(
            f"{name} returns {len(optimizers)} optimizers ({kinds}), which {type(module).__name__} steps one by one; "
            f"{by} has one for all parameters. Return one HybridOptimizer for each part from configure_optimizers "
            "instead, e.g. [HybridOptimizer.from_module(self.generator), "
            f"HybridOptimizer.from_module(self.discriminator)], and leave out {by}."
        )
    reads = _settings_read(module, function)
    no_effect = f" What it reads has no effect: {', '.join(reads)}." if reads else ""
    return (
        f"{by} replaces {name}: {unused} not used.{no_effect} {_used(configured)} Set {settings} instead. To keep a "
        f"scheduler of your own, {keep}."
    )


def _unused(method: Callable[[], Any]) -> tuple[str, list[Optimizer]]:
    """What the method would have returned, as a subject with its verb, and the optimizers among it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizers, schedulers = optimizers_in(method())
    except Exception as error:  # whatever it needs, it is not used
        return f"its optimizer, learning rate and scheduler (it raises {type(error).__name__}) are", []
    described = [_describe(optimizer) for optimizer in optimizers]
    described += [f"the scheduler {type(scheduler).__name__}" for scheduler in schedulers]
    if not described:
        return "what it returns, no optimizer, is", optimizers
    return f"its {' and '.join(described)} {'are' if len(described) > 1 else 'is'}", optimizers


def _describe(optimizer: Optimizer) -> str:
    shown = []
    for key in ("lr", "weight_decay"):
        values = [group.get(f"initial_{key}", group.get(key)) for group in optimizer.param_groups]
        if all(isinstance(value, (int, float)) for value in values):
            shown.append(f"{key}={' and '.join(dict.fromkeys(f'{value:g}' for value in values))}")
    return f"{type(optimizer).__name__}({', '.join(shown)})"


def _used(configured: Any) -> str:
    (hybrid, *_), schedulers = optimizers_in(configured)
    assert isinstance(hybrid, HybridOptimizer)
    children = " and ".join(f"{_describe(child)} for {name!r}" for name, child in hybrid.optimizers.items())
    schedule = "with a schedule" if schedulers else "at constant rates"
    return f"The fit uses {children}, {schedule}."


def _settings_read(module: LightningModule, function: Callable[..., Any]) -> list[str]:
    """Hyperparameters and plain attributes of the module that the code of a method names."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    names = dict.fromkeys(code.co_names if code is not None else ())
    names |= dict.fromkeys(c for c in (code.co_consts if code is not None else ()) if isinstance(c, str))
    held = {**{key: value for key, value in vars(module).items() if not key.startswith("_")}, **module.hparams}
    return [f"{name}={held[name]}" for name in names if name in held and isinstance(held[name], _PLAIN)]
