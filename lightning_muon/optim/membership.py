"""The parameters of a hybrid: how they join its children and leave them, and what ties its param groups to theirs."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.optim import Optimizer

from lightning_muon.optim import foreign
from lightning_muon.optim.arguments import (
    FOLLOWS_KEY,
    OPTIMIZER_KEY,
    WRITTEN_BY_OTHERS,
    check_option_names,
    check_rule_options,
    class_label,
    constructor_options,
)
from lightning_muon.optim.building import add_group
from lightning_muon.optim.matrix import MatrixOptimizer
from lightning_muon.optim.rollback import unchanged_on_error
from lightning_muon.optim.routing import Routing, set_rate
from lightning_muon.optim.shared_options import FollowedRates, MomentumAlias
from lightning_muon.partition import ParameterAssignment, Partition

_log = logging.getLogger(__name__)


@dataclass
class Links:
    """What ties a hybrid to its children, beside the groups and the state that they share.

    One object, because wrappers such as Lightning's share our attributes but keep to themselves those that they set.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    """``param_groups`` as the children last got them."""
    mode: str | None = None
    """Which of ``"train"`` and ``"eval"`` was called last."""
    stateful: list[str] = field(default_factory=list)
    """Names of children that make their state at construction."""


class _ParameterHolder(Optimizer):
    """The half of :class:`~lightning_muon.optim.HybridOptimizer` that knows which child has which parameters.

    ``param_groups`` holds the very dicts of the children, and those groups that are empty as all their parameters are
    frozen; all share one ``state``. Which child has a group is kept by the name of the group, in ``_routing``; the
    children's own lists follow from that.
    """

    optimizers: dict[str, Optimizer]
    _routing: Routing
    _links: Links
    _momentum: MomentumAlias
    _rates: FollowedRates
    _constructing: bool

    @property
    def partition(self) -> Partition | None:
        """Which parameter belongs to which child, and why; None where the children were made by hand."""
        return self._routing.partition

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters in groups of their own, e.g. to train a layer that is unfrozen at another learning rate.

        Parameters that the partition knows go where it sends them, split into several groups if need be; options in
        ``param_group`` apply to all of them. Others need a ``"name"`` that begins with a child's, e.g. ``"other/new"``.
        What is not given is as in the group that they would have been in from the start.

        ``lr`` is the rate at the peak of the schedule: where a scheduler has the other groups, the new one starts where
        they are. Several groups of one call follow the ``lr`` of the last, ``param_groups[-1]``, which is the one that
        ``BackboneFinetuning`` sets, until somebody gives them their own.

        Raises:
            ValueError: if nothing says where a parameter belongs, if a parameter has an optimizer already, for an
                option that the optimizer does not have, or if that optimizer refuses the group. Nothing is changed
                then.
        """
        if self._constructing:
            super().add_param_group(param_group)
            return
        with unchanged_on_error(self, *self.optimizers.values()):
            parts = self._routing.split(param_group)
            for owner, group in parts:
                child = self.optimizers[owner]
                check_option_names(child, group, WRITTEN_BY_OTHERS | foreign.flags_of(child))
            added = [self._add_group(owner, group, param_group.get("lr")) for owner, group in parts]
            for group in added[:-1]:
                group[FOLLOWS_KEY] = added[-1]["name"]
            self._update_children()

    def adopt(self, partition: Partition) -> list[ParameterAssignment]:
        """Go on with a new partition of the module, after layers were added, replaced, renamed or removed.

        Parameters that are new, and trainable, join the groups that the partition sends them to; those that are new
        and frozen join once they are unfrozen. Known ones stay where they are, under their new names, and those that
        the module lost leave, with their state.

        Args:
            partition: of the same module; see :func:`~lightning_muon.partition.partition_parameters`.

        Returns:
            The entries that joined.

        Raises:
            ValueError: names the parameters that no child takes. Nothing is changed then.
        """
        with unchanged_on_error(self, *self.optimizers.values()):
            before = {entry.parameter: entry for entry in self.partition or ()}
            present = {entry.parameter for entry in partition}
            entries = [_renamed(before[e.parameter], e) if e.parameter in before else e for e in partition]
            names = {entry.parameter: entry.name for entry in entries}
            for group in self.param_groups:
                stay = [
                    (parameter, names.get(parameter, name))
                    for parameter, name in zip(group["params"], group["param_names"], strict=True)
                    if parameter in present or parameter not in before
                ]
                group["params"] = [parameter for parameter, _ in stay]
                group["param_names"] = [name for _, name in stay]
            for parameter in before.keys() - present:
                self.state.pop(parameter, None)
            self._routing.adopt(Partition(entries), self.param_groups)
            for child in self.optimizers.values():
                if isinstance(child, MatrixOptimizer):
                    child.layouts.update({e.parameter: e.layout for e in entries if e.layout is not None})
            self._update_children()
            joining = [e for e in self._routing.waiting if not e.frozen and e.parameter not in before]
            self._take_in(joining)
        return joining

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``; and parameters that were frozen so far, and take gradients now, join their groups.

        So they are among ``param_groups`` when gradients are clipped or unscaled. Those whose first gradient
        came without a call of this method join in :meth:`step`; with a ``GradScaler``, call this one rather than the
        module's.
        """
        if self._routing.waiting:
            self._take_in([entry for entry in self._routing.waiting if not entry.frozen])
        self._rates.carry()
        super().zero_grad(set_to_none)

    def _take_in(self, entries: Sequence[ParameterAssignment]) -> None:
        """Let parameters of the partition, so far in no group, join."""
        if not entries:
            return
        together: dict[tuple[str, str], list[ParameterAssignment]] = {}
        for entry in entries:
            together.setdefault((entry.group, entry.group_name), []).append(entry)
        with unchanged_on_error(self, *self.optimizers.values()):
            if not self._children_are_up_to_date():
                self._update_children()
            for (owner, name), members in together.items():
                self._join(owner, name, members)
            self._update_children()
        _log.info("%d parameters that take gradients now joined the optimizer.", len(entries))

    def _join(self, owner: str, name: str, entries: Sequence[ParameterAssignment]) -> None:
        """Let parameters join the group that they belong to, or one like it with counters of its own."""
        child = self.optimizers[owner]
        members = {"params": [e.parameter for e in entries], "param_names": [e.name for e in entries]}
        group = next((group for group in self.param_groups if group["name"] == name), None)
        check_rule_options(child, {"name": name, **entries[0].options})
        if group is None or (group["params"] and foreign.counts_in_groups(child)):
            self._add_group(owner, {**entries[0].options, "name": name, **members})
            return
        add_group(child, {**group, **members})  # checks them, and prepares what it needs
        joined = child.param_groups.pop()
        self._add_initial_state(owner, joined)
        params, names = [*group["params"], *joined["params"]], [*group["param_names"], *joined["param_names"]]
        group.update(joined)
        group["params"], group["param_names"] = self._routing.in_order(params, names)

    def _add_group(self, owner: str, group: dict[str, Any], lr: Any = None) -> dict[str, Any]:
        """Add a new group to a child: with the options given, else with those of the group of that name."""
        self._name_groups()
        taken = {parameter for own in self.param_groups for parameter in own["params"]}
        if not taken.isdisjoint(group["params"]):
            raise ValueError("Some of these parameters are optimized already: each may be in one param group only.")
        child = self.optimizers[owner]
        siblings = [own for own in self.param_groups if self._routing.owner(own) == owner]
        like = next((own for own in siblings if own["name"] == group["name"]), None)
        if like is not None:
            options = self._routing.built.get(like["name"], {})
            if not foreign.counts_in_groups(child):
                options = {key: like[key] for key in constructor_options(child) if key in like}
            group = {**options, **group}
        set_rate(group, lr, like, siblings, self.param_groups, child.defaults.get("lr"))
        group["name"] = self._unused_name(group["name"])
        self._set_param_names(group)
        add_group(child, group)
        group = child.param_groups[-1]
        self._add_initial_state(owner, group)
        self._complete(group, owner)
        self._routing.owners[group["name"]] = owner
        self.param_groups.append(group)
        return group

    def _add_initial_state(self, owner: str, group: dict[str, Any]) -> None:
        if owner in self._links.stateful:
            foreign.add_initial_state(self.optimizers[owner], group)

    def _complete_all(self) -> None:
        self._name_groups()
        for group in self.param_groups:
            self._complete(group, self._routing.owner(group))

    def _complete(self, group: dict[str, Any], owner: str) -> None:
        """Give a group what each has: names to load by, the class of its optimizer, and a momentum to log."""
        group[OPTIMIZER_KEY] = class_label(self.optimizers[owner])
        self._set_param_names(group)
        self._momentum.add(group)

    def _set_param_names(self, group: dict[str, Any]) -> None:
        # torch wants all groups or none to have names.
        if "param_names" not in group:
            known = {entry.parameter: entry.name for entry in self.partition or ()}
            group["param_names"] = [known.get(p, f"{group['name']}[{i}]") for i, p in enumerate(group["params"])]

    def _name_groups(self) -> None:
        """Name the groups that others put into ``param_groups`` without one, and keep which child has them."""
        for group in self.param_groups:
            owner = self._routing.owner(group)
            if "name" not in group:
                group["name"] = self._unused_name(owner)
            self._routing.owners[group["name"]] = owner

    def _unused_name(self, name: str) -> str:
        taken = {group.get("name") for group in self.param_groups}
        number = 2
        unused = name
        while unused in taken:
            unused = f"{name}/{number}"
            number += 1
        return unused

    def _children_are_up_to_date(self) -> bool:
        """False once somebody assigned other groups or another state, as Lightning's BaseFinetuning does on resume."""
        groups, linked = self.param_groups, self._links.groups
        same_groups = len(groups) == len(linked) and not any(map(operator.is_not, groups, linked))
        return same_groups and all(child.state is self.state for child in self.optimizers.values())

    def _update_children(self) -> None:
        """Give each child its groups, as far as they have parameters, and the state of all."""
        links = self._links
        self._rates.carry()
        self._name_groups()
        for owner, child in self.optimizers.items():
            owned = [group for group in self.param_groups if self._routing.owner(group) == owner and group["params"]]
            child.__setstate__({"state": self.state, "param_groups": owned})
        self._routing.refresh(self.param_groups)
        links.groups = list(self.param_groups)
        self._momentum.remember(self.param_groups)
        self._rates.remember(self.param_groups)
        if links.mode is not None:  # new groups begin in the other one
            self._switch(links.mode)

    def _switch(self, mode: str) -> None:
        """Call ``train`` or ``eval`` of the children that have these modes."""
        for child in self.optimizers.values():
            if foreign.has_modes(child):
                getattr(child, mode)()


def _renamed(entry: ParameterAssignment, new: ParameterAssignment) -> ParameterAssignment:
    return replace(entry, name=new.name, aliases=new.aliases)
