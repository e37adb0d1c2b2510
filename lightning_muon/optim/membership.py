"""The parameters of a hybrid optimizer: how they join its children and leave them."""

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
    """Bookkeeping of a hybrid optimizer about its children.

    It is one object, because Lightning's wrapper of an optimizer shares the attributes of the optimizer, but an
    attribute that is set on the wrapper stays on the wrapper.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    """``param_groups`` when the children were last updated."""
    mode: str | None = None
    """``"train"`` or ``"eval"``: the method that was called last; None before the first call."""
    stateful: list[str] = field(default_factory=list)
    """Names of the children that create their state in the constructor."""


class _ParameterHolder(Optimizer):
    """Base class of :class:`~lightning_muon.optim.HybridOptimizer`: knows which child has which parameters.

    ``param_groups`` holds the same dicts as the children, and the empty groups whose parameters are all frozen. All
    share one ``state``. ``_routing`` maps the name of a group to its child; the ``param_groups`` of the children are
    derived from that.
    """

    optimizers: dict[str, Optimizer]
    _routing: Routing
    _links: Links
    _momentum: MomentumAlias
    _rates: FollowedRates
    _constructing: bool

    @property
    def partition(self) -> Partition | None:
        """Which parameter belongs to which child, and why; None if the constructor got no partition."""
        return self._routing.partition

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters in new param groups, e.g. to train an unfrozen layer at another learning rate.

        Parameters that are in the partition go to the child that it names, in several groups if needed. The options in
        ``param_group`` apply to all of these groups. Other parameters need a ``"name"`` that begins with the name of a
        child, e.g. ``"other/new"``. Options that are not given are those of the group that the parameters would have
        been in from the start.

        ``lr`` is the learning rate at the peak of the schedule: if a scheduler has changed the other groups, the new
        one starts at the same point of the schedule. If one call adds several groups, they follow the ``lr`` of the
        last one, ``param_groups[-1]``, which ``BackboneFinetuning`` sets, until their own ``lr`` is set.

        Raises:
            ValueError: if it is unknown which child a parameter belongs to, if a parameter has an optimizer already, if
                the optimizer does not have an option, or if the optimizer refuses the group. Nothing changes then.
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
        """Use a new partition of the module, after layers were added, replaced, renamed or removed.

        New trainable parameters join the groups that the partition names; new frozen ones join once they are unfrozen.
        Known parameters stay in their groups, with their new names. Parameters that are no longer in the module are
        removed, with their state.

        Args:
            partition: new partition of the same module; see :func:`~lightning_muon.partition.partition_parameters`.

        Returns:
            The entries of the partition that joined.

        Raises:
            ValueError: if no child takes a parameter. Nothing changes then.
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
        """Reset the gradients as in ``torch.optim``, and let parameters that were unfrozen join their groups.

        So they are in ``param_groups`` when gradients are clipped or unscaled. Without a call of this method they join
        in :meth:`step`. With a ``GradScaler``, call this method rather than ``zero_grad`` of the module.
        """
        if self._routing.waiting:
            self._take_in([entry for entry in self._routing.waiting if not entry.frozen])
        self._rates.carry()
        super().zero_grad(set_to_none)

    def _take_in(self, entries: Sequence[ParameterAssignment]) -> None:
        """Let parameters of the partition that are in no group join their groups."""
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
        """Let parameters join their group, or a new group if the child counts steps per group."""
        child = self.optimizers[owner]
        members = {"params": [e.parameter for e in entries], "param_names": [e.name for e in entries]}
        group = next((group for group in self.param_groups if group["name"] == name), None)
        check_rule_options(child, {"name": name, **entries[0].options})
        if group is None or (group["params"] and foreign.counts_in_groups(child)):
            self._add_group(owner, {**entries[0].options, "name": name, **members})
            return
        add_group(child, {**group, **members})  # the child checks and completes the group
        joined = child.param_groups.pop()
        self._add_initial_state(owner, joined)
        params, names = [*group["params"], *joined["params"]], [*group["param_names"], *joined["param_names"]]
        group.update(joined)
        group["params"], group["param_names"] = self._routing.in_order(params, names)

    def _add_group(self, owner: str, group: dict[str, Any], lr: Any = None) -> dict[str, Any]:
        """Add a new group to a child. Options that are not given are those of the group of the same name."""
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
        """Add the class of its optimizer, parameter names and ``momentum`` to a group."""
        group[OPTIMIZER_KEY] = class_label(self.optimizers[owner])
        self._set_param_names(group)
        self._momentum.add(group)

    def _set_param_names(self, group: dict[str, Any]) -> None:
        # torch requires that all groups have param_names, or none.
        if "param_names" not in group:
            known = {entry.parameter: entry.name for entry in self.partition or ()}
            group["param_names"] = [known.get(p, f"{group['name']}[{i}]") for i, p in enumerate(group["params"])]

    def _name_groups(self) -> None:
        """Name the groups that others put into ``param_groups`` without a name, and note the child of each group."""
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
        """False if groups or state were replaced from outside, as Lightning's BaseFinetuning does on resume."""
        groups, linked = self.param_groups, self._links.groups
        same_groups = len(groups) == len(linked) and not any(map(operator.is_not, groups, linked))
        return same_groups and all(child.state is self.state for child in self.optimizers.values())

    def _update_children(self) -> None:
        """Give each child the shared state and those of its groups that have parameters."""
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
        if links.mode is not None:  # new groups may be in the other mode
            self._switch(links.mode)

    def _switch(self, mode: str) -> None:
        """Call ``train()`` or ``eval()`` of the children that have these modes."""
        for child in self.optimizers.values():
            if foreign.has_modes(child):
                getattr(child, mode)()


def _renamed(entry: ParameterAssignment, new: ParameterAssignment) -> ParameterAssignment:
    return replace(entry, name=new.name, aliases=new.aliases)
