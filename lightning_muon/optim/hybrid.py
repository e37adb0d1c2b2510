"""HybridOptimizer: several optimizers that are one ``torch.optim.Optimizer``."""

from __future__ import annotations

import logging
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, overload

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_muon.optim import foreign
from lightning_muon.optim.arguments import (
    FOLLOWS_KEY,
    OPTIMIZER_KEY,
    WRITTEN_BY_OTHERS,
    check_option_names,
    constructor_options,
)
from lightning_muon.optim.building import (
    OptimizerFactory,
    add_group,
    build_child,
    check_children,
    check_names,
    shared_defaults,
    warn_without_matrices,
)
from lightning_muon.optim.checkpoint import check_class, class_label, match_groups, state_of
from lightning_muon.optim.matrix import MatrixOptimizer, UpdateObserver
from lightning_muon.optim.muon import Muon
from lightning_muon.optim.rollback import unchanged_on_error
from lightning_muon.optim.routing import Routing, peak_rate, set_rate
from lightning_muon.partition import ParameterAssignment, ParameterRule, Partition, partition_parameters

_log = logging.getLogger(__name__)


@dataclass
class _Links:
    """What follows from the param groups and the children, kept up to date by ``HybridOptimizer._link``.

    One object, because wrappers such as Lightning's share our attributes but keep to themselves those that they set.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    order: list[Optimizer] = field(default_factory=list)
    """The children as they step."""
    modal: list[Optimizer] = field(default_factory=list)
    """Children that are switched between training and evaluation."""
    mode: str | None = None
    """Which of ``"train"`` and ``"eval"`` was called last."""
    stateful: list[str] = field(default_factory=list)
    """Names of children that make their state at construction."""
    momenta: dict[int, Any] = field(default_factory=dict)
    followers: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Groups whose learning rate follows another's, and these."""
    rates: dict[int, Any] = field(default_factory=dict)
    """Their learning rates when last seen."""
    observers: OrderedDict[int, UpdateObserver] = field(default_factory=OrderedDict)


class HybridOptimizer(Optimizer):
    """Several optimizers, each on its own parameters, behind one ``torch.optim.Optimizer``.

    ``param_groups`` holds the very dicts of the children, and all share one ``state``: schedulers, gradient clipping,
    ``GradScaler``, ``state_dict`` and distributed checkpoints see one flat, ordinary optimizer. Groups have unique
    names, e.g. ``"other/embedding"`` and ``"matrix"``.

    Args:
        optimizers: the children by name, in the order of their groups. Groups of the child ``"matrix"`` that have no
            ``"name"`` are called ``"matrix"``, or ``"matrix/0"``, ``"matrix/1"``, ... if there are several.
        partition: which parameter belongs to which child. With it, parameters that are frozen now join their child
            once they are unfrozen, and :meth:`add_param_group` routes parameters by itself.
        **options: none; the error says what to do for packages that call ``optimizer(params=..., lr=...)``.

    Groups of which all parameters are frozen are in ``param_groups`` from the start, empty, so that schedulers count
    them; the children see them once they have parameters. A parameter that is unfrozen joins its group, at the group's
    learning rate. Optimizers of other packages may count steps in the group: there it joins a group of its own, e.g.
    ``"matrix/2"``, at the same rate, which ``LambdaLR`` of torch refuses and the schedules of this package do not.

    Raises:
        ValueError: if there is no child, if children share a parameter or if two groups have one name.
        TypeError: if a child is not a ``torch.optim.Optimizer``, wraps another one, or evaluates the model by itself
            (``LBFGS``).

    Example::

        optimizer = HybridOptimizer.from_module(
            model, matrix=partial(Muon, lr=1e-3), other=partial(torch.optim.AdamW, lr=1e-3)
        )
    """

    def __init__(
        self, optimizers: Mapping[str, Optimizer] | None = None, partition: Partition | None = None, **options: Any
    ) -> None:
        check_children(optimizers, options)
        self.optimizers = dict(optimizers or {})
        self._routing = Routing(partition, self.optimizers)
        self._links = _Links()
        groups = []
        for owner, child in self.optimizers.items():
            for index, group in enumerate(child.param_groups):
                group.setdefault("name", owner if len(child.param_groups) == 1 else f"{owner}/{index}")
                self._routing.owners[group["name"]] = owner
                self._complete(group, owner)
                groups.append(group)
        check_names(groups)
        self._constructing = True
        super().__init__(groups, shared_defaults(self.optimizers))
        self._constructing = False
        for owner, child in self.optimizers.items():
            if child.state:
                self._links.stateful.append(owner)
            self.state.update(child.state)
            if partition is not None and isinstance(child, MatrixOptimizer):  # frozen matrices may join later
                child.layouts.update({entry.parameter: entry.layout for entry in partition if entry.layout is not None})
        self._routing.start(self.param_groups)
        self._link()

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        matrix: OptimizerFactory | None = None,
        other: OptimizerFactory | None = None,
        rules: Sequence[ParameterRule] = (),
        partition: Partition | None = None,
    ) -> HybridOptimizer:
        """Partition the parameters of a module and build one optimizer for each part.

        Args:
            module: any module; its trainable parameters are optimized.
            matrix: called with the param groups of the matrices: a class or ``functools.partial``. None: :class:`Muon`.
            other: called with the param groups of everything else. None: ``torch.optim.AdamW``.
            rules: what to do differently; see :class:`~lightning_muon.partition.ParameterRule`.
            partition: the answer of an earlier :func:`~lightning_muon.partition.partition_parameters`, instead of
                ``rules``.

        Raises:
            ValueError: if no parameter is trainable, or a rule sets an option that its optimizer does not have.
        """
        if partition is None:
            partition = partition_parameters(module, rules)
        elif rules:
            raise ValueError("Give rules or a partition, not both: a partition has its rules applied already.")
        if all(entry.frozen for entry in partition):
            raise ValueError(f"{type(module).__name__} has no trainable parameter: nothing to optimize.")
        optimizers: dict[str, Optimizer] = {}
        for owner, factory in (("other", other or AdamW), ("matrix", matrix or Muon)):
            child = build_child(factory, partition, owner)
            if child is not None:
                optimizers[owner] = child
        warn_without_matrices(module, partition, optimizers)
        return cls(optimizers, partition)

    @property
    def partition(self) -> Partition | None:
        """Which parameter belongs to which child, and why; None where the children were made by hand."""
        return self._routing.partition

    @property
    def configured_rates(self) -> dict[str, float]:
        """The learning rate of each param group as the optimizers were built, before a schedule or a checkpoint."""
        return {name: peak_rate(options) for name, options in self._routing.built.items()}

    @property
    def peak_rates(self) -> dict[str, float]:
        """The learning rate of each param group now, before a schedule multiplies it."""
        return {group["name"]: peak_rate(group) for group in self.param_groups}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters in groups of their own, e.g. to train a layer that is unfrozen at another learning rate.

        Parameters that the partition knows go where it sends them, split into several groups if need be; options in
        ``param_group`` apply to all of them. Others need a ``"name"`` that begins with a child's, e.g. ``"other/new"``.
        What is not given is as in the group that they would have been in from the start.

        ``lr`` is the rate at the peak of the schedule: where a scheduler has the other groups, the new one starts where
        they are. Several groups of one call follow the ``lr`` of the last, ``param_groups[-1]``, which is the one that
        ``BackboneFinetuning`` sets, until somebody gives them their own.

        Raises:
            ValueError: if it is unknown where a parameter belongs, if it has an optimizer already, for an option that
                its optimizer does not have, or if that refuses it. Nothing is changed then.
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
            self._link()

    def adopt(self, partition: Partition) -> list[ParameterAssignment]:
        """Go on with a new partition of the module, after layers were added, replaced, renamed or removed.

        Parameters that are new, and trainable, join the groups that it sends them to; those that are new and frozen
        join once they are unfrozen. Known ones stay where they are, under their new names, and those that the module
        lost leave, with their state.

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
            self._link()
            joining = [e for e in self._routing.waiting if not e.frozen and e.parameter not in before]
            self._take_in(joining)
        return joining

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``; and parameters that were frozen so far, and take gradients now, join their groups.

        So they are among ``param_groups`` when gradients are clipped or unscaled. Those whose first gradient came
        without it join in :meth:`step`; with a ``GradScaler``, call this method rather than the module's.
        """
        if self._routing.waiting:
            self._take_in([entry for entry in self._routing.waiting if not entry.frozen])
        self._follow_rates()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step of every child.

        Args:
            closure: re-evaluates the model and returns the loss; run once, first, with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._is_linked():
            self._link()
        if self._routing.waiting:
            unfrozen = [entry for entry in self._routing.waiting if not entry.frozen]
            self._take_in([entry for entry in unfrozen if entry.parameter.grad is not None])
        self._follow_rates()
        self._carry_momentum()
        # Who differentiates the gradients has to do so while all weights are as they were. Matrix optimizers check
        # everything before they move anything: then they, so that a refused step changes nothing. They get the loss,
        # which some rules need; others would take a closure for leave to evaluate the model.
        for child in self._links.order:
            if not child.param_groups:  # all its parameters are frozen
                continue
            if isinstance(child, MatrixOptimizer) and closure is not None:
                child.step(lambda: cast(float, loss))
            else:
                child.step()
        return loss

    @property
    def differentiates_gradients(self) -> bool:
        """Whether a child needs gradients of ``backward(create_graph=True)``, as SophiaH does."""
        return any(map(foreign.differentiates_gradients, self.optimizers.values()))

    def train(self) -> None:
        """Switch schedule-free children to the weights to train on; others have no such mode. A Trainer does it."""
        self._links.mode = "train"
        for child in self._links.modal:
            child.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Switch schedule-free children to the weights to evaluate and to save."""
        self._links.mode = "eval"
        for child in self._links.modal:
            child.eval()  # type: ignore[attr-defined]

    def observe_updates(self, observer: UpdateObserver) -> RemovableHandle:
        """Call ``observer(name, update)`` at each step, for each parameter of each :class:`MatrixOptimizer` that moves.

        See :meth:`MatrixOptimizer.observe_updates`. Parameters that join later are observed too.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        observers = [child._observers for child in self.optimizers.values() if isinstance(child, MatrixOptimizer)]
        handle = RemovableHandle(self._links.observers, extra_dict=observers)
        for registered in (self._links.observers, *observers):
            registered[handle.id] = observer
        return handle

    def state_dict(self) -> dict[str, Any]:
        """One flat state; what children of other packages keep besides is under ``"children"``, by name."""
        state_dict = super().state_dict()
        extras = {owner: foreign.extra_entries(child) for owner, child in self.optimizers.items()}
        return {**state_dict, "children": extras} if any(extras.values()) else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load by parameter name, all of it or, after an error, nothing.

        The order of groups and parameters may have changed. Parameters that are frozen here, and were trained when the
        state was saved, join; a parameter may be in another group of the same child, and takes the options that this
        group was saved with. Learning rates are those of the state: compare :attr:`configured_rates`.

        Raises:
            ValueError: if a parameter is missing, unexpected or with another child than it was, if another class of
                optimizer saved the state, or if it does not fit. The optimizer is as it was then.
            TypeError: if it is no dict.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = dict(state_dict)  # the hook may change it
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        with unchanged_on_error(self, *self.optimizers.values()):
            self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("optimizers", "_routing", "_constructing")}
        links = _Links(mode=self._links.mode, stateful=self._links.stateful)
        return {**super().__getstate__(), **own, "_links": links}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _load(self, state_dict: dict[str, Any]) -> None:
        self._complete_all()
        self._routing.refresh(self.param_groups)
        matched = match_groups(state_dict, self.param_groups, self._routing)
        own = {group["name"]: group for group in self.param_groups}
        all_ids = [saved_id for group in matched for saved_id in group.ids]
        extras = state_dict.get("children", {})
        state: dict[Any, Any] = {}
        loaded: dict[str, dict[str, Any]] = {}
        tasks: list[tuple[Optimizer, list[dict[str, Any]], dict[str, Any]]] = []
        for owner, child in self.optimizers.items():
            groups = [group for group in matched if group.owner == owner]
            for group in groups:
                self._routing.owners[group.name] = owner
                if not isinstance(child, MatrixOptimizer) or not group.params:  # these check it themselves
                    check_class(group.options, child, repr(group.name))
            loaded.update({g.name: {**own.get(g.name, {}), **g.live()} for g in groups})
            groups = [group for group in groups if group.params]
            if groups or extras.get(owner):
                ids = [saved_id for group in groups for saved_id in group.ids]
                part = {
                    "state": state_of(state_dict, ids, all_ids),
                    "param_groups": [group.saved() for group in groups],
                }
                tasks.append((child, [loaded[group.name] for group in groups], {**extras.get(owner, {}), **part}))
        # Children of other packages last: what they do to themselves cannot be undone, so they rehearse it first.
        tasks.sort(key=lambda task: foreign.loads_its_own_way(task[0]))
        for child, groups_now, part in tasks:
            if foreign.loads_its_own_way(child):
                foreign.rehearse_load(child, groups_now, part)
        for child, groups_now, part in tasks:
            child.__setstate__({"state": defaultdict(dict), "param_groups": groups_now})
            child.load_state_dict(part)
            foreign.check_state_shapes(child)
            state.update(child.state)
            loaded.update({group["name"]: group for group in child.param_groups})
        # Groups that were built stay, though their parameters may have gone to others; schedulers count on them.
        empty: dict[str, Any] = {"params": [], "param_names": []}
        kept = {name: {**own[name], **empty} for name in own.keys() & self._routing.built.keys() - loaded.keys()}
        order = [*own, *(name for name in loaded if name not in own)]
        self.param_groups[:] = [(loaded | kept)[name] for name in order if name in loaded or name in kept]
        self.state.clear()  # the same objects, which wrappers of Lightning hold
        self.state.update(state)
        self._links.mode = None  # the groups say which weights were saved
        self._complete_all()
        self._routing.refresh(self.param_groups)
        self._link()

    def _take_in(self, entries: Sequence[ParameterAssignment]) -> None:
        """Let parameters of the partition, so far in no group, join."""
        if not entries:
            return
        together: dict[tuple[str, str], list[ParameterAssignment]] = {}
        for entry in entries:
            together.setdefault((entry.group, entry.group_name), []).append(entry)
        with unchanged_on_error(self, *self.optimizers.values()):
            if not self._is_linked():
                self._link()
            for (owner, name), members in together.items():
                self._join(owner, name, members)
            self._link()
        _log.info("%d parameters that take gradients now joined the optimizer.", len(entries))

    def _join(self, owner: str, name: str, entries: Sequence[ParameterAssignment]) -> None:
        """Let parameters join the group that they belong to, or one like it with counters of its own."""
        child = self.optimizers[owner]
        members = {"params": [e.parameter for e in entries], "param_names": [e.name for e in entries]}
        group = next((group for group in self.param_groups if group["name"] == name), None)
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
        taken = {parameter for own in self.param_groups for parameter in own["params"]}
        if not taken.isdisjoint(group["params"]):
            raise ValueError("Some of these parameters are optimized already: each may be in one param group only.")
        child = self.optimizers[owner]
        siblings = [own for own in self.param_groups if self._owner(own) == owner]
        like = next((own for own in siblings if own["name"] == group["name"]), None)
        if like is not None:
            built = self._routing.built.get(like["name"], {})
            options = (
                built
                if foreign.counts_in_groups(child)
                else {k: like[k] for k in constructor_options(child) if k in like}
            )
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
        for group in self.param_groups:
            self._complete(group, self._owner(group))

    def _complete(self, group: dict[str, Any], owner: str) -> None:
        """Give a group what each has: names to load by, the class of its optimizer, and a momentum to log."""
        group[OPTIMIZER_KEY] = class_label(self.optimizers[owner])
        self._set_param_names(group)
        # So that none takes another child's from the shared defaults.
        group.setdefault("momentum", group["betas"][0] if "betas" in group else 0.0)

    def _set_param_names(self, group: dict[str, Any]) -> None:
        # torch wants all groups or none to have names.
        if "param_names" not in group:
            known = {entry.parameter: entry.name for entry in self.partition or ()}
            group["param_names"] = [known.get(p, f"{group['name']}[{i}]") for i, p in enumerate(group["params"])]

    def _owner(self, group: dict[str, Any]) -> str:
        """Name of the child that takes a group of ``param_groups``, which may have been put there by others."""
        owner = self._routing.owner(group)
        if "name" not in group:
            group["name"] = self._unused_name(owner)
        self._routing.owners[group["name"]] = owner
        return owner

    def _unused_name(self, name: str) -> str:
        taken = {group.get("name") for group in self.param_groups}
        number = 2
        unused = name
        while unused in taken:
            unused = f"{name}/{number}"
            number += 1
        return unused

    def _is_linked(self) -> bool:
        """False once somebody assigned other groups or another state, as Lightning's BaseFinetuning does on resume."""
        groups, linked = self.param_groups, self._links.groups
        same_groups = len(groups) == len(linked) and not any(map(operator.is_not, groups, linked))
        return same_groups and all(child.state is self.state for child in self.optimizers.values())

    def _link(self) -> None:
        """Give the children this optimizer's state and groups; empty groups stay here."""
        self._follow_rates()
        links = self._links
        for owner, child in self.optimizers.items():
            owned = [group for group in self.param_groups if self._owner(group) == owner and group["params"]]
            child.__setstate__({"state": self.state, "param_groups": owned})
        self._routing.refresh(self.param_groups)
        children = self.optimizers.values()
        links.groups = list(self.param_groups)
        links.order = sorted(children, key=_turn)
        links.modal = [child for child in children if foreign.has_modes(child)]
        links.momenta = {id(group): group.get("momentum") for group in self.param_groups}
        named = {group["name"]: group for group in self.param_groups}
        links.followers = [(g, named[g[FOLLOWS_KEY]]) for g in self.param_groups if g.get(FOLLOWS_KEY) in named]
        links.rates = {id(group): group.get("lr") for pair in links.followers for group in pair}
        if links.mode is not None:  # new groups begin in the other one
            for child in links.modal:
                getattr(child, links.mode)()

    def _follow_rates(self) -> None:
        """Carry a learning rate that was set on one of several groups that were added together to the others."""
        seen = self._links.rates
        for group, leader in self._links.followers:
            if leader["lr"] != seen[id(leader)] and group["lr"] == seen[id(group)]:
                group["lr"] = leader["lr"]
        seen.update({id(group): group["lr"] for pair in self._links.followers for group in pair})

    def _carry_momentum(self) -> None:
        """Keep ``momentum`` and ``betas[0]`` of a group the same, whichever a scheduler such as OneCycleLR has set."""
        momenta = self._links.momenta
        for group in self.param_groups:
            if "betas" not in group or "momentum" not in group or group["momentum"] == group["betas"][0]:
                continue
            if "momentum" in self.optimizers[self._owner(group)].defaults:  # its own, and not another word for betas[0]
                continue
            if group["momentum"] != momenta.get(id(group), group["momentum"]):
                group["betas"] = (group["momentum"], *group["betas"][1:])
            else:
                group["momentum"] = group["betas"][0]
            momenta[id(group)] = group["momentum"]


def _turn(child: Optimizer) -> tuple[bool, bool]:
    """Sorts the children into the order in which they step."""
    return not foreign.differentiates_gradients(child), not isinstance(child, MatrixOptimizer)


def _renamed(entry: ParameterAssignment, new: ParameterAssignment) -> ParameterAssignment:
    return replace(entry, name=new.name, aliases=new.aliases)
