"""The partition that a run trains with: read from its optimizers, not computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_muon.optim import HybridOptimizer, MatrixOptimizer
from lightning_muon.partition import MatrixLayout, ParameterAssignment, ParameterRule, Partition, partition_parameters
from lightning_muon.partition.sites import walk


def running_partition(module: nn.Module, optimizers: Sequence[Optimizer]) -> Partition | None:
    """Return how the optimizers of a run treat each parameter of a module.

    Parameters that only other optimizers have, or none, are in the group ``"other"``; the reason says so.

    Args:
        module: the module that is trained; it gives the names.
        optimizers: optimizers of the Trainer.

    Returns:
        One entry per parameter, or None if no optimizer is from this package.
    """
    if not any(map(_is_ours, optimizers)):
        return None
    known = known_to_optimizers(optimizers)
    takers = _takers(optimizers)
    names: dict[nn.Parameter, list[str]] = {}
    for site in walk(module):
        if site.name not in names.setdefault(site.parameter, []):
            names[site.parameter].append(site.name)
    entries = []
    for parameter, (name, *aliases) in names.items():
        entry = known.get(parameter) or _by_hand(parameter, takers.get(parameter))
        entries.append(dataclasses.replace(entry, name=name, aliases=tuple(aliases)))
    return Partition(entries)


def known_to_optimizers(optimizers: Sequence[Optimizer]) -> dict[nn.Parameter, ParameterAssignment]:
    """Return the entries of parameters that optimizers of this package have, or plan for (frozen ones).

    The entries have the names that the optimizers know.
    """
    ours = [optimizer for optimizer in optimizers if _is_ours(optimizer)]
    by_hand = {parameter: _by_hand(parameter, taker) for parameter, taker in _takers(ours).items()}
    planned = {e.parameter: e for o in ours if isinstance(o, HybridOptimizer) for e in o.partition or ()}
    return {**by_hand, **planned}


def partition_of(
    module: nn.Module, optimizers: Sequence[Optimizer], rules: Sequence[ParameterRule] = ()
) -> tuple[Partition, bool]:
    """Return the partition of a run, and whether its optimizers gave it.

    Without an optimizer of this package, :func:`partition_parameters` makes it, with the module's ``parameter_rules``
    and ``rules``.

    Raises:
        ValueError: as in :func:`partition_parameters`.
    """
    running = running_partition(module, optimizers)
    if running is not None:
        return running, True
    own = getattr(module, "parameter_rules", None) or ()
    return partition_parameters(module, [*own, *rules]), False


def _is_ours(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, (HybridOptimizer, MatrixOptimizer))


def _takers(optimizers: Sequence[Optimizer]) -> dict[nn.Parameter, Optimizer]:
    """Map each parameter to its optimizer; in a hybrid, to its child optimizer."""
    single: list[Optimizer] = []
    for optimizer in optimizers:
        single += optimizer.optimizers.values() if isinstance(optimizer, HybridOptimizer) else [optimizer]
    return {parameter: child for child in single for group in child.param_groups for parameter in group["params"]}


def _by_hand(parameter: nn.Parameter, taker: Optimizer | None) -> ParameterAssignment:
    """Return the entry, without a name, of a parameter given to its optimizer by hand, or to none."""
    reason = "In no optimizer." if taker is None else f"Given to {type(taker).__name__} by hand."
    if isinstance(taker, MatrixOptimizer):
        layout = taker.layouts.get(parameter, MatrixLayout())
        return ParameterAssignment("", parameter, "hidden", "matrix", layout, reason, group_name="matrix")
    return ParameterAssignment("", parameter, "other", "other", None, reason, group_name="other")
