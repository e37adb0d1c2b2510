"""Construction of the children of a hybrid optimizer from a partition, and checks of the children."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_muon.optim import foreign
from lightning_muon.optim.arguments import (
    NO_CLASS,
    STRUCTURAL_KEYS,
    WRITTEN_BY_OTHERS,
    UnknownOptionError,
    check_own_keys,
    check_rule_options,
    constructor_options,
    set_by_rule,
)
from lightning_muon.optim.matrix import MatrixOptimizer
from lightning_muon.optim.routing import can_train, options_of
from lightning_muon.optim.shared_options import default_momentum
from lightning_muon.partition import Partition

OptimizerFactory: TypeAlias = Callable[[list[dict[str, Any]]], Optimizer]


def build_child(factory: OptimizerFactory, partition: Partition, owner: str) -> Optimizer | None:
    """Build the child for one group of a partition; None if the group has no parameter.

    The param groups hold the trainable parameters. A param group whose parameters are all frozen is empty: schedulers
    need it, and its parameters join it once they are unfrozen. It has the options that the factory gives it.

    Raises:
        ValueError: if a rule sets an option that the optimizer does not have, or that is out of range.
        TypeError: if the factory does not return an optimizer, or one that cannot be part of a hybrid.
    """
    groups = _groups(partition, owner)
    if not groups:
        return None
    for group in groups:
        _check_options(group)
    try:
        optimizer = _construct(factory, groups, owner)
    except UnknownOptionError as error:
        ruled = next((group for group in groups if error.key in group), None)
        if ruled is None:  # the factory sets it
            raise
        raise UnknownOptionError.of(error.kind, error.key, error.options, set_by_rule(ruled)) from None
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{factory!r} returned {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    for group in groups:
        check_rule_options(optimizer, group)
    frozen = {group["name"] for group in groups if _is_frozen(group)}
    for group in optimizer.param_groups:
        group.pop("layouts", None)
        if group.get("name") in frozen:
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)
            group["params"], group["param_names"] = [], []
    return optimizer


def add_group(child: Optimizer, group: dict[str, Any]) -> None:
    """Add a group to a child. The group may also have keys that the class of the child writes into its groups."""
    if not isinstance(child, MatrixOptimizer):
        child.add_param_group(group)
        return
    allowed = {*constructor_options(child), *STRUCTURAL_KEYS, *WRITTEN_BY_OTHERS}
    child.add_param_group({key: value for key, value in group.items() if key in allowed})
    child.param_groups[-1].update({key: value for key, value in group.items() if key not in allowed})


def warn_of_partition(module: nn.Module, partition: Partition, optimizers: Mapping[str, Optimizer]) -> None:
    """Emit the warnings about a partition, on rank 0 only."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
        return
    texts = partition.warnings()
    if not any(entry.group == "matrix" and not entry.frozen for entry in partition):
        texts = [_without_matrices(module, partition, optimizers), *texts]
    for text in texts:
        warnings.warn(text, stacklevel=3)


def check_children(optimizers: Mapping[str, Optimizer] | None, options: Mapping[str, Any]) -> None:
    """Check the arguments of a hybrid optimizer.

    Args:
        optimizers: the children by name, or another argument that was passed in their place.
        options: all other keyword arguments.

    Raises:
        ValueError: if there is no child, or if children share a parameter.
        TypeError: if a child is not an optimizer or cannot be part of a hybrid, or if there are options.
    """
    if options:
        raise TypeError(
            f"HybridOptimizer has no options of its own, got {', '.join(options)}: its children have them. {NO_CLASS}"
        )
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise ValueError(
            "HybridOptimizer takes a mapping of names to optimizers, e.g. {'other': AdamW(...), 'matrix': Muon(...)}, "
            f"got {optimizers!r}. To partition a module use HybridOptimizer.from_module. {NO_CLASS}"
        )
    for name, child in optimizers.items():
        if not isinstance(child, Optimizer):
            raise TypeError(f"The child {name!r} is {type(child).__name__}, not a torch.optim.Optimizer.")
        foreign.check_child(name, child)
        for index, group in enumerate(child.param_groups):
            check_own_keys(child, group, f"param group {index} of the child {name!r}")
    foreign.check_together(optimizers)
    owners = Counter(p for child in optimizers.values() for group in child.param_groups for p in group["params"])
    if any(count > 1 for count in owners.values()):
        shapes = [tuple(parameter.shape) for parameter, count in owners.items() if count > 1]
        raise ValueError(f"Each parameter may have one optimizer only; these shapes are in several: {shapes}.")


def check_names(groups: Iterable[dict[str, Any]]) -> None:
    """Raise ``ValueError`` if two param groups have the same name."""
    repeated = [name for name, count in Counter(group["name"] for group in groups).items() if count > 1]
    if repeated:
        raise ValueError(f"Param group names must be unique, got {', '.join(repeated)} more than once.")


def shared_defaults(optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """The ``defaults`` of a hybrid, for code that reads them: learning rate and momentum."""
    rates = [child.defaults["lr"] for child in optimizers.values() if "lr" in child.defaults]
    return {**({"lr": rates[-1]} if rates else {}), **default_momentum(optimizers.values())}


def _without_matrices(module: nn.Module, partition: Partition, optimizers: Mapping[str, Optimizer]) -> str:
    """The warning for a module without trainable hidden matrices."""
    start = f"{type(module).__name__} has no trainable hidden matrix: every parameter goes to "
    text = f"{start}{type(optimizers['other']).__name__} and no matrix optimizer is used."
    if "matrix" in optimizers:
        count = sum(entry.group == "matrix" for entry in partition)
        text = (
            f"{start}{type(optimizers['other']).__name__}. {count} hidden matrices are frozen, and go to "
            f"{type(optimizers['matrix']).__name__} once they are unfrozen."
        )
    return text


def _groups(partition: Partition, owner: str) -> list[dict[str, Any]]:
    """Param groups of the partition for one child.

    A group holds its trainable parameters, or, if it has none, its frozen ones. Parameters that can never train, such
    as quantized ones, are in no group.
    """
    entries = [entry for entry in partition if entry.group == owner and can_train(entry.parameter)]
    trained = {entry.group_name for entry in entries if not entry.frozen}
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.frozen and entry.group_name in trained:
            continue
        start = {"name": entry.group_name, "params": [], "param_names": [], **entry.options}
        group = groups.setdefault(entry.group_name, start)
        group["params"].append(entry.parameter)
        group["param_names"].append(entry.name)
        if owner == "matrix":
            group.setdefault("layouts", []).append(entry.layout)
    return list(groups.values())


def _is_frozen(group: Mapping[str, Any]) -> bool:
    return not any(parameter.requires_grad for parameter in group["params"])


def _construct(factory: OptimizerFactory, groups: list[dict[str, Any]], owner: str) -> Optimizer:
    """Construct the optimizer. If it does not accept frozen parameters, their groups are empty."""
    try:
        return foreign.construct(factory, [dict(group) for group in groups], owner)
    except Exception:
        if not any(map(_is_frozen, groups)):
            raise
        empty: dict[str, Any] = {"params": [], "param_names": []}
        bare = [{**options_of(group), **empty} if _is_frozen(group) else dict(group) for group in groups]
        try:
            return foreign.construct(factory, bare, owner)
        except Exception:
            pass
        raise


def _check_options(group: dict[str, Any]) -> None:
    """Check ``lr`` and ``weight_decay`` of a group. Optimizers of torch only check their defaults."""
    for key in ("lr", "weight_decay"):
        value = group.get(key, 0.0)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, Tensor) and not (number and 0.0 <= value < math.inf):
            raise ValueError(
                f"A parameter rule sets {key}={value!r} for the group {group['name']!r}: it must be a finite number "
                "of 0 or more."
            )
