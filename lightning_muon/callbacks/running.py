"""The partition by which a run trains: the optimizers' own, not one made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_muon.optim import HybridOptimizer, MatrixOptimizer
from lightning_muon.partition import MatrixLayout, ParameterAssignment, ParameterRule, Partition, partition_parameters
from lightning_muon.partition.sites import walk


def running_partition(module: nn.Module, optimizers: Sequence[Optimizer]) -> Partition | None:
    """What the optimizers of a run do with each parameter of a module.

    Parameters that only other optimizers have, or none, are in the group ``"other"``; the reason says so.

    Args:
        module: the module that is trained; gives the names.
        optimizers: of the Trainer.

    Returns:
        One entry a parameter, or None if no optimizer is one of this package.
    """
    if not any(isinstance(optimizer, (HybridOptimizer, MatrixOptimizer)) for optimizer in optimizers):
        return None
    planned = {e.parameter: e for o in optimizers if isinstance(o, HybridOptimizer) for e in o.partition or ()}
    takers = {p: child for child in _single(optimizers) for group in child.param_groups for p in group["params"]}
    names: dict[nn.Parameter, list[str]] = {}
    for site in walk(module):
        if site.name not in names.setdefault(site.parameter, []):
            names[site.parameter].append(site.name)
    entries = []
    for parameter, (name, *aliases) in names.items():
        entry = planned.get(parameter)
        if entry is None:
            entry = _without_plan(name, parameter, takers.get(parameter))
        entries.append(dataclasses.replace(entry, name=name, aliases=tuple(aliases)))
    return Partition(entries)


def partition_of(
    module: nn.Module, optimizers: Sequence[Optimizer], rules: Sequence[ParameterRule] = ()
) -> tuple[Partition, bool]:
    """The partition of a run, and whether it is the running one.

    Without an optimizer of this package it is what :func:`partition_parameters` would make of the module under its
    ``parameter_rules`` and ``rules``.

    Raises:
        ValueError: as :func:`partition_parameters`.
    """
    running = running_partition(module, optimizers)
    if running is not None:
        return running, True
    own = getattr(module, "parameter_rules", None) or ()
    return partition_parameters(module, [*own, *rules]), False


def _single(optimizers: Sequence[Optimizer]) -> Iterator[Optimizer]:
    for optimizer in optimizers:
        if isinstance(optimizer, HybridOptimizer):
            yield from optimizer.optimizers.values()
        else:
            yield optimizer


def _without_plan(name: str, parameter: nn.Parameter, taker: Optimizer | None) -> ParameterAssignment:
    """The entry of a parameter that was given to its optimizer by hand, or to none."""
    if isinstance(taker, MatrixOptimizer):
        layout = taker.layouts.get(parameter, MatrixLayout())
        reason = f"Given to {type(taker).__name__} by hand."
        return ParameterAssignment(name, parameter, "hidden", "matrix", layout, reason, group_name="matrix")
    reason = "In no optimizer." if taker is None else f"Given to {type(taker).__name__} by hand."
    return ParameterAssignment(name, parameter, "other", "other", None, reason, group_name="other")
