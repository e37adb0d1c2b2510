"""HybridOptimizer: several optimizers behind one ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast, overload

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_muon.optim import foreign
from lightning_muon.optim.building import (
    OptimizerFactory,
    build_child,
    check_children,
    check_names,
    shared_defaults,
    warn_of_partition,
)
from lightning_muon.optim.checkpoint import check_class, match_groups, state_of
from lightning_muon.optim.matrix import MatrixOptimizer
from lightning_muon.optim.membership import Links, _ParameterHolder
from lightning_muon.optim.muon import Muon
from lightning_muon.optim.observing import UpdateObserver
from lightning_muon.optim.rollback import unchanged_on_error
from lightning_muon.optim.routing import Routing
from lightning_muon.optim.shared_options import FollowedRates, MomentumAlias
from lightning_muon.partition import ParameterRule, Partition, partition_parameters


class HybridOptimizer(_ParameterHolder):
    """Several optimizers, each on its own parameters, behind one ``torch.optim.Optimizer``.

    ``param_groups`` holds the same dicts as the children, and all share one ``state``. So schedulers, gradient
    clipping, ``GradScaler``, ``state_dict`` and distributed checkpoints see one flat, ordinary optimizer. Param groups
    have unique names, e.g. ``"other/embedding"`` and ``"matrix"``.

    Args:
        optimizers: the children by name, in the order of their groups. Groups of the child ``"matrix"`` that have no
            ``"name"`` are called ``"matrix"``, or ``"matrix/0"``, ``"matrix/1"``, ... if there are several.
        partition: which parameter belongs to which child. With it, parameters that are frozen now join their child
            once they are unfrozen, and :meth:`add_param_group` finds the child of a parameter.
        **options: not accepted; the error helps with packages that call ``optimizer(params=..., lr=...)``.

    If all parameters of a group are frozen, the group is in ``param_groups`` from the start, but empty, so that
    schedulers count it. Its child gets the group once it has parameters. A parameter that is unfrozen joins its group,
    at the learning rate of that group. Optimizers of other packages may count steps per group: there the parameter
    joins a new group, e.g. ``"matrix/2"``, at the same learning rate. ``LambdaLR`` and ``CosineAnnealingLR`` of torch
    do not support groups that are added late; the schedules of this package do.

    Raises:
        ValueError: if there is no child, if children share a parameter or if two groups have the same name.
        TypeError: if a child is not a ``torch.optim.Optimizer``, wraps another one, or evaluates the model in its step
            (``LBFGS``).

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = HybridOptimizer.from_module(
        ...     model, matrix=partial(Muon, lr=1e-3), other=partial(torch.optim.AdamW, lr=1e-3)
        ... )
    """

    def __init__(
        self, optimizers: Mapping[str, Optimizer] | None = None, partition: Partition | None = None, **options: Any
    ) -> None:
        check_children(optimizers, options)
        self.optimizers = dict(optimizers or {})
        self._routing = Routing(partition, self.optimizers)
        self._links = Links()
        self._momentum = MomentumAlias()
        self._rates = FollowedRates()
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
        self._update_children()

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
            matrix: optimizer of the matrices: a class, or a ``functools.partial`` of one, which is called with their
                param groups. None for :class:`Muon`.
            other: optimizer of all other parameters, in the same form. None for ``torch.optim.AdamW``.
            rules: exceptions to the default partition; see :class:`~lightning_muon.partition.ParameterRule`.
            partition: result of :func:`~lightning_muon.partition.partition_parameters`, instead of ``rules``.

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
        warn_of_partition(module, partition, optimizers)
        return cls(optimizers, partition)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step of every child.

        Args:
            closure: re-evaluates the model and returns the loss. It runs first, once, with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._children_are_up_to_date():
            self._update_children()
        if self._routing.waiting:
            unfrozen = [entry for entry in self._routing.waiting if not entry.frozen]
            self._take_in([entry for entry in unfrozen if entry.parameter.grad is not None])
        self._rates.carry()
        self._momentum.carry(group for group in self.param_groups if not self._has_momentum(group))
        # A child that differentiates the gradients steps first, because it needs the weights of the backward pass.
        # Matrix optimizers are next: they check all gradients before they change a weight, so that they raise before
        # other children have stepped. Only they get a closure, which returns the loss that some rules need. Other
        # optimizers might call a closure to evaluate the model again.
        for child in self._order:
            if not child.param_groups:  # all its parameters are frozen
                continue
            if isinstance(child, MatrixOptimizer) and closure is not None:
                child.step(lambda: cast(float, loss))
            else:
                child.step()
        return loss

    @property
    def differentiates_gradients(self) -> bool:
        """Whether a child needs ``backward(create_graph=True)``, as SophiaH does."""
        return any(map(foreign.differentiates_gradients, self.optimizers.values()))

    def train(self) -> None:
        """Switch schedule-free children to the weights for training. Lightning's Trainer calls this method."""
        self._links.mode = "train"
        self._switch("train")

    def eval(self) -> None:
        """Switch schedule-free children to the weights for evaluation and checkpoints."""
        self._links.mode = "eval"
        self._switch("eval")

    def observe_updates(self, observer: UpdateObserver) -> RemovableHandle:
        """Call ``observer(update)`` at each step, for each stack of matrices, before the weights change.

        This calls :meth:`MatrixOptimizer.observe_updates` of each child that is a :class:`MatrixOptimizer`. Updates of
        other children are not observed. Parameters that join later are observed too.

        Returns:
            A handle whose ``remove()`` removes the observer from all children.
        """
        observed = [child._observers for child in self.optimizers.values() if isinstance(child, MatrixOptimizer)]
        handle = RemovableHandle(OrderedDict(), extra_dict=observed)
        for observers in observed:
            observers[handle.id] = observer
        return handle

    def state_dict(self) -> dict[str, Any]:
        """Return one flat state. Extra entries of children of other packages are under ``"children"``, by name."""
        state_dict = super().state_dict()
        extras = {owner: foreign.extra_entries(child) for owner, child in self.optimizers.items()}
        return {**state_dict, "children": extras} if any(extras.values()) else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state by parameter name. After an error nothing has changed.

        The order of groups and parameters may have changed. Parameters that are frozen now, but were trained when the
        state was saved, join their group. A parameter may have been in another group of the same child: it moves to
        that group, with the options that were saved. Learning rates are those of the state.

        Raises:
            ValueError: if a parameter is missing, unexpected or belonged to another child, if an optimizer of another
                class saved the state, or if the state does not fit.
            TypeError: if the state is not a dict.
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
        links = Links(mode=self._links.mode, stateful=self._links.stateful)
        anew = {"_links": links, "_momentum": MomentumAlias(), "_rates": FollowedRates()}
        return {**super().__getstate__(), **own, **anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._update_children()

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
                if not isinstance(child, MatrixOptimizer) or not group.params:  # MatrixOptimizer checks it itself
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
        # Children of other packages load last, and on a copy first, because their changes cannot be undone.
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
        # Keep the groups of the start even if their parameters have moved to others: schedulers rely on their number.
        empty: dict[str, Any] = {"params": [], "param_names": []}
        kept = {name: {**own[name], **empty} for name in own.keys() & self._routing.built.keys() - loaded.keys()}
        order = [*own, *(name for name in loaded if name not in own)]
        self.param_groups[:] = [(loaded | kept)[name] for name in order if name in loaded or name in kept]
        self.state.clear()  # in place: wrappers of Lightning hold the same objects
        self.state.update(state)
        self._links.mode = None  # the loaded groups say in which mode they were saved
        self._complete_all()
        self._routing.refresh(self.param_groups)
        self._update_children()

    @cached_property
    def _order(self) -> list[Optimizer]:
        """The children in the order in which they step."""
        return sorted(self.optimizers.values(), key=_turn)

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        """Whether the optimizer of a group has its own ``momentum``; if not, ``momentum`` stands for ``betas[0]``."""
        return "momentum" in self.optimizers[self._routing.owner(group)].defaults


def _turn(child: Optimizer) -> tuple[bool, bool]:
    """Sort key for the order in which the children step."""
    return not foreign.differentiates_gradients(child), not isinstance(child, MatrixOptimizer)
