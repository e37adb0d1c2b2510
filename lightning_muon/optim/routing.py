"""Routing of parameters to the children of a hybrid optimizer, their param groups and learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_muon.partition import ParameterAssignment, Partition

_MEMBERS = ("params", "param_names", "layouts")


class Routing:
    """What a hybrid optimizer knows about its param groups beyond their contents.

    Args:
        partition: which parameter belongs to which child; None to route parameters by the names of their groups.
        children: names of the children.
    """

    def __init__(self, partition: Partition | None, children: Iterable[str]) -> None:
        self.partition = partition
        self.children = tuple(children)
        self.owners: dict[str, str] = {}
        """Maps the name of a param group to the name of its child."""
        self.built: dict[str, dict[str, Any]] = {}
        """Options of the param groups when the optimizers were built, by the name of the group."""
        self.waiting: list[ParameterAssignment] = []
        """Frozen parameters that are in no group. They join once they require a gradient."""
        self._left_out: list[Tensor] = []

    def start(self, groups: Sequence[dict[str, Any]]) -> None:
        """Note the groups of a new hybrid. A trainable parameter in none of them is left out on purpose."""
        self.built = {group["name"]: options_of(group) for group in groups}
        taken = _members(groups)
        self._left_out = [
            entry.parameter for entry in self.partition or () if not entry.frozen and entry.parameter not in taken
        ]
        self.refresh(groups)

    def refresh(self, groups: Sequence[dict[str, Any]]) -> None:
        """Find the parameters of the partition that are in no group and may join later."""
        excluded = _members(groups).union(self._left_out)
        self.waiting = [
            entry
            for entry in self.partition or ()
            if entry.parameter not in excluded and entry.group in self.children and can_train(entry.parameter)
        ]

    def adopt(self, partition: Partition, groups: Sequence[dict[str, Any]]) -> None:
        """Use a new partition of the same module.

        Raises:
            ValueError: if a trainable parameter belongs to a child that does not exist.
        """
        refused = [entry for entry in partition if not entry.frozen and entry.group not in self.children]
        if refused:
            names = ", ".join(f"{entry.name!r} ({entry.group})" for entry in refused)
            raise ValueError(
                f"No optimizer takes {names}: this one has {', '.join(map(repr, self.children))} only. Make these "
                "layers before the optimizer, or send them to one that exists by a ParameterRule(group=...)."
            )
        self.partition = partition
        self.refresh(groups)

    def owner(self, group: Mapping[str, Any]) -> str:
        """Return the name of the child of a group: by the name of the group, or by its parameters.

        Raises:
            ValueError: if neither the name nor the partition tells.
        """
        name = group.get("name")
        if name in self.owners:
            return self.owners[name]
        by_name = self.owner_by_name(name)
        if by_name is not None:
            return by_name
        return self._entries_of(group["params"])[0].group

    def owner_by_name(self, name: str | None) -> str | None:
        """Return the name of the child that a group of this name belongs to; None if the name does not tell."""
        prefix = str(name or "").split("/")[0]
        return self.owners.get(name or "", prefix if prefix in self.children else None)

    def split(self, param_group: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Split a new group into (child, group) pairs.

        The groups hold the given options, those of parameter rules, and a ``name`` that may exist already.

        Raises:
            ValueError: if there is no parameter, or if the child of a parameter is unknown.
        """
        options = options_of(param_group)
        given = [param_group["params"]] if isinstance(param_group["params"], Tensor) else list(param_group["params"])
        parameters = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        if not given:
            raise ValueError("A new param group needs at least one parameter, got an empty list.")
        owner = self.owner_by_name(options.get("name"))
        if owner is not None:
            names = {"param_names": [entry[0] for entry in given]} if isinstance(given[0], tuple) else {}
            return [(owner, {**param_group, "params": parameters, **names})]
        routed: dict[tuple[str, str], dict[str, Any]] = {}
        for entry in self._entries_of(parameters):
            key = (entry.group, entry.group_name)
            group = routed.setdefault(
                key, {"params": [], "param_names": [], **entry.options, **options, "name": entry.group_name}
            )
            group["params"].append(entry.parameter)
            group["param_names"].append(entry.name)
        return [(owner, group) for (owner, _), group in routed.items()]

    def in_order(self, parameters: Sequence[Tensor], names: Sequence[str]) -> tuple[list[Tensor], list[str]]:
        """Sort the members of a group into the order of the partition."""
        place: dict[Tensor, int] = {entry.parameter: index for index, entry in enumerate(self.partition or ())}
        pairs = sorted(zip(parameters, names, strict=True), key=lambda pair: place.get(pair[0], len(place)))
        return [parameter for parameter, _ in pairs], [name for _, name in pairs]

    def _entries_of(self, parameters: Sequence[Tensor]) -> list[ParameterAssignment]:
        known: dict[Tensor, ParameterAssignment] = {entry.parameter: entry for entry in self.partition or ()}
        for parameter in parameters:
            if parameter not in known or known[parameter].group not in self.children:
                raise ValueError(
                    f"It is unknown which optimizer should take a new parameter of shape {tuple(parameter.shape)}. "
                    f"Name the group after one of {', '.join(self.children)}, e.g. "
                    f"{{'params': [...], 'name': '{self.children[0]}/new'}}."
                )
        return [known[parameter] for parameter in parameters]


def can_train(parameter: Tensor) -> bool:
    """Whether a parameter can have a gradient at all."""
    return parameter.is_floating_point() or parameter.is_complex()


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a param group besides its members."""
    return {key: value for key, value in group.items() if key not in _MEMBERS}


def peak_rate(group: Mapping[str, Any]) -> Any:
    """The learning rate of a group at the peak of its schedule; None if the group has no learning rate."""
    return group.get("max_lr", group.get("initial_lr", group.get("lr")))


def set_rate(
    group: dict[str, Any],
    lr: Any,
    like: Mapping[str, Any] | None,
    siblings: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    default: Any,
) -> None:
    """Set the learning rate of a new group, at the same point of the schedule as the other groups.

    A schedule multiplies all learning rates by the same factor, which is ``lr / initial_lr`` of any scheduled group. So
    the new group gets the values of another group, times the ratio of their peak learning rates.

    Args:
        group: the new group, changed in place. If it has ``initial_lr``, it stays as it is.
        lr: learning rate at the peak of the schedule; None for that of ``like``, else that of the siblings.
        like: the group that the parameters would have been in from the start, if there is one.
        siblings: the other groups of its child.
        groups: all other groups.
        default: default learning rate of the child; None if it has none.

    Raises:
        ValueError: if the siblings have several learning rates, so that the caller has to choose.
    """
    if "initial_lr" in group or default is None:
        return
    if lr is None:
        lr = _common_peak(siblings, default, group["name"]) if like is None else peak_rate(like)
    candidates = [other for other in (like, *siblings, *groups) if other is not None and "initial_lr" in other]
    model = next((other for other in candidates if float(peak_rate(other)) > 0), None)
    group["lr"] = lr
    if model is None:
        return
    factor = float(lr) / float(peak_rate(model))
    group.update({key: model[key] * factor for key in ("initial_lr", "max_lr", "min_lr") if key in model})
    group.update({key: model[key] for key in ("max_momentum", "base_momentum", "swa_lr") if key in model})
    # The factor is at most 1, even if a learning rate was raised above its peak by hand.
    group["lr"] = lr * min(1.0, float(model["lr"]) / float(peak_rate(model)))


def _common_peak(groups: Sequence[Mapping[str, Any]], default: Any, name: str) -> Any:
    """The peak learning rate that the groups of a child have in common, for a new group without one.

    Raises:
        ValueError: if they have several, and none of them is the default.
    """
    peaks = {group["name"]: peak_rate(group) for group in groups if peak_rate(group) is not None}
    distinct = {float(peak): peak for peak in peaks.values()}
    if not distinct or float(default) in distinct:
        return default
    if len(distinct) == 1:
        return next(iter(distinct.values()))
    rates = ", ".join(f"{float(peak):g} in {group!r}" for group, peak in peaks.items())
    raise ValueError(f"The new param group {name!r} needs an 'lr': the others of its optimizer have {rates}.")


def _members(groups: Iterable[Mapping[str, Any]]) -> set[Tensor]:
    return {parameter for group in groups for parameter in group["params"]}
