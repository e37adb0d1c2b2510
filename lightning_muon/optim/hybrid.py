"""HybridOptimizer: several optimizers that are one ``torch.optim.Optimizer``."""

from __future__ import annotations

import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_muon.optim import foreign
from lightning_muon.optim.checkpoint import match_by_name
from lightning_muon.optim.matrix import MatrixOptimizer
from lightning_muon.optim.muon import Muon
from lightning_muon.partition import ParameterAssignment, ParameterRule, Partition, partition_parameters

OptimizerFactory: TypeAlias = Callable[[list[dict[str, Any]]], Optimizer]


class HybridOptimizer(Optimizer):
    """Several optimizers, each on its own parameters, behind one ``torch.optim.Optimizer``.

    ``param_groups`` holds the very dicts of the children, and all share one ``state``: schedulers, gradient clipping,
    ``GradScaler``, ``state_dict`` and distributed checkpoints see one flat, ordinary optimizer. Groups have unique
    names, e.g. ``"other/embedding"`` and ``"matrix"``.

    Args:
        optimizers: the children by name, in the order of their groups. Groups of the child ``"matrix"`` that have no
            ``"name"`` are called ``"matrix"``, or ``"matrix/0"``, ``"matrix/1"``, ... if there are several.
        partition: which parameter belongs to which child; lets :meth:`add_param_group` route parameters by itself.
            Kept as an attribute.

    Raises:
        ValueError: if there is no child, if children share a parameter or if two groups have one name.
        TypeError: if a child is not a ``torch.optim.Optimizer``, wraps another one, or evaluates the model by itself
            (``LBFGS``).

    Example::

        optimizer = HybridOptimizer.from_module(
            model, matrix=partial(Muon, lr=1e-3), other=partial(torch.optim.AdamW, lr=1e-3)
        )
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], partition: Partition | None = None) -> None:
        _check_children(optimizers)
        self.optimizers = dict(optimizers)
        self.partition = partition
        groups = []
        for owner, child in self.optimizers.items():
            for index, group in enumerate(child.param_groups):
                group.setdefault("name", owner if len(child.param_groups) == 1 else f"{owner}/{index}")
                _set_param_names(group, partition)
                _set_momentum(group)
                groups.append(group)
        _check_names(groups)
        # group name -> name of the child that has it
        self._owners = {
            group["name"]: owner for owner, child in self.optimizers.items() for group in child.param_groups
        }
        self._constructing = True
        super().__init__(groups, _shared_defaults(self.optimizers))
        self._constructing = False
        for child in self.optimizers.values():
            self.state.update(child.state)
            if partition is not None and isinstance(child, MatrixOptimizer):  # frozen matrices may join later
                child.layouts.update({entry.parameter: entry.layout for entry in partition if entry.layout is not None})
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
        optimizers: dict[str, Optimizer] = {}
        other_groups, matrix_groups = partition.param_groups("other"), partition.param_groups("matrix")
        if other_groups:
            optimizers["other"] = _build(other or AdamW, other_groups, "other")
        if matrix_groups:
            optimizers["matrix"] = _build(matrix or Muon, matrix_groups, "matrix")
        if not optimizers:
            raise ValueError(f"{type(module).__name__} has no trainable parameter: nothing to optimize.")
        if not matrix_groups:
            warnings.warn(
                f"{type(module).__name__} has no trainable hidden matrix: every parameter goes to "
                f"{type(optimizers['other']).__name__} and no matrix optimizer is used.",
                stacklevel=2,
            )
        for text in partition.warnings():
            warnings.warn(text, stacklevel=2)
        return cls(optimizers, partition)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, e.g. when they are unfrozen.

        Parameters that the partition knows go where it sends them, split into several groups if need be; options in
        ``param_group`` apply to all of them. Others need a ``"name"`` that begins with a child's, e.g. ``"other/new"``.

        Raises:
            ValueError: if it is unknown where a parameter belongs.
        """
        if self._constructing:
            super().add_param_group(param_group)
            return
        taken = {parameter for group in self.param_groups for parameter in group["params"]}
        for owner, group in self._route(param_group):
            if not taken.isdisjoint(group["params"]):
                raise ValueError("Some of these parameters are optimized already: each may be in one param group only.")
            group["name"] = self._unused_name(group["name"])
            _set_param_names(group, self.partition)
            child = self.optimizers[owner]
            child.add_param_group(group)
            group = child.param_groups[-1]
            _set_momentum(group)
            self.param_groups.append(group)
            self._owners[group["name"]] = owner
            self._linked = list(self.param_groups)

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
        self._carry_momentum()
        # Who differentiates the gradients has to do so while all weights are as they were. Matrix optimizers check
        # everything before they move anything: then they, so that a refused step changes nothing. They get the loss,
        # which some rules need; others would take a closure for leave to evaluate the model.
        for child in self._order:
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
        for child in self._modal:
            child.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Switch schedule-free children to the weights to evaluate and to save."""
        for child in self._modal:
            child.eval()  # type: ignore[attr-defined]

    def observe_updates(self, observer: Callable[[str, Tensor], None]) -> list[Any]:
        """Register ``observer(name, update)`` with every child that is a :class:`MatrixOptimizer`; a handle each."""
        children = self.optimizers.values()
        return [child.observe_updates(observer) for child in children if isinstance(child, MatrixOptimizer)]

    def state_dict(self) -> dict[str, Any]:
        """One flat state; what children of other packages keep besides is under ``"children"``, by name."""
        state_dict = super().state_dict()
        extras = {owner: foreign.extra_entries(child) for owner, child in self.optimizers.items()}
        return {**state_dict, "children": extras} if any(extras.values()) else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load by parameter name: the order of groups and parameters may have changed, their membership may not.

        Raises:
            ValueError: if a parameter is missing, unexpected or in another group than it was; names them.
        """
        state_dict = match_by_name(state_dict, self.param_groups)
        owners = [self._owner(group) for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        for owner, part in foreign.split_state(state_dict, owners).items():
            child = self.optimizers[owner]
            child.load_state_dict(part)
            self.state.update(child.state)
            own = [group for group, name in zip(self.param_groups, owners, strict=True) if name == owner]
            for group, loaded in zip(own, child.param_groups, strict=True):
                group.update(loaded)
        self._link()

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("optimizers", "partition", "_owners", "_constructing")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _is_linked(self) -> bool:
        """False once somebody assigned other groups or another state, as Lightning's BaseFinetuning does on resume."""
        groups, linked = self.param_groups, self._linked
        same_groups = len(groups) == len(linked) and not any(map(operator.is_not, groups, linked))
        return same_groups and all(child.state is self.state for child in self.optimizers.values())

    def _link(self) -> None:
        """Give the children this optimizer's state and groups."""
        for owner, child in self.optimizers.items():
            owned = [group for group in self.param_groups if self._owner(group) == owner]
            child.__setstate__({"state": self.state, "param_groups": owned})
        self._linked = list(self.param_groups)
        children = self.optimizers.values()
        self._order = sorted(children, key=_turn)
        self._modal = [child for child in children if foreign.has_modes(child)]
        self._momenta = {id(group): group.get("momentum") for group in self.param_groups}

    def _carry_momentum(self) -> None:
        """Keep ``momentum`` and ``betas[0]`` of a group the same, whichever a scheduler such as OneCycleLR has set."""
        for group in self.param_groups:
            if "betas" not in group or "momentum" not in group or group["momentum"] == group["betas"][0]:
                continue
            if "momentum" in self.optimizers[self._owner(group)].defaults:  # its own, and not another word for betas[0]
                continue
            if group["momentum"] != self._momenta.get(id(group), group["momentum"]):
                group["betas"] = (group["momentum"], *group["betas"][1:])
            else:
                group["momentum"] = group["betas"][0]
            self._momenta[id(group)] = group["momentum"]

    def _owner(self, group: dict[str, Any]) -> str:
        """Name of the child that takes a group of ``param_groups``."""
        known = self._owners.get(group["name"]) if "name" in group else None
        if known is None:
            (known, _), *_ = self._route(group)
            self._owners[group.setdefault("name", self._unused_name(known))] = known
        return known

    def _route(self, param_group: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """(child, group) pairs for the parameters of a new group."""
        options = {key: value for key, value in param_group.items() if key not in ("params", "param_names", "layouts")}
        given = [param_group["params"]] if isinstance(param_group["params"], Tensor) else list(param_group["params"])
        parameters = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        if not given:
            raise ValueError("A new param group needs at least one parameter, got an empty list.")
        owner = str(options.get("name", "")).split("/")[0]
        if owner in self.optimizers:
            names = {"param_names": [entry[0] for entry in given]} if isinstance(given[0], tuple) else {}
            return [(owner, {**param_group, "params": parameters, **names})]
        known: dict[Tensor, ParameterAssignment] = {}
        if self.partition is not None:
            known = {entry.parameter: entry for entry in self.partition}
        routed: dict[tuple[str, str], dict[str, Any]] = {}
        for parameter in parameters:
            if parameter not in known or known[parameter].group not in self.optimizers:
                raise ValueError(
                    f"It is unknown which optimizer should take a new parameter of shape {tuple(parameter.shape)}. "
                    f"Name the group after one of {', '.join(self.optimizers)}, e.g. "
                    f"{{'params': [...], 'name': '{next(iter(self.optimizers))}/new'}}."
                )
            entry = known[parameter]
            group = routed.setdefault(
                (entry.group, entry.group_name), {"params": [], **entry.options, **options, "name": entry.group_name}
            )
            group["params"].append(parameter)
        return [(owner, group) for (owner, _), group in routed.items()]

    def _unused_name(self, name: str) -> str:
        taken = {group.get("name") for group in self.param_groups}
        number = 2
        unused = name
        while unused in taken:
            unused = f"{name}/{number}"
            number += 1
        return unused


def _check_children(optimizers: Mapping[str, Optimizer]) -> None:
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise ValueError(
            "HybridOptimizer takes a mapping of names to optimizers, e.g. {'other': AdamW(...), 'matrix': Muon(...)}, "
            f"got {optimizers!r}. To partition a module use HybridOptimizer.from_module."
        )
    for name, child in optimizers.items():
        if not isinstance(child, Optimizer):
            raise TypeError(f"The child {name!r} is {type(child).__name__}, not a torch.optim.Optimizer.")
        foreign.check_child(name, child)
    foreign.check_together(optimizers)
    owners = Counter(p for child in optimizers.values() for group in child.param_groups for p in group["params"])
    if any(count > 1 for count in owners.values()):
        shapes = [tuple(parameter.shape) for parameter, count in owners.items() if count > 1]
        raise ValueError(f"Each parameter may have one optimizer only; these shapes are in several: {shapes}.")


def _turn(child: Optimizer) -> tuple[bool, bool]:
    """Sorts the children into the order in which they step."""
    return not foreign.differentiates_gradients(child), not isinstance(child, MatrixOptimizer)


def _check_names(groups: Iterable[dict[str, Any]]) -> None:
    repeated = [name for name, count in Counter(group["name"] for group in groups).items() if count > 1]
    if repeated:
        raise ValueError(f"Param group names must be unique, got {', '.join(repeated)} more than once.")


def _shared_defaults(optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """What generic code looks up in ``defaults``: OneCycleLR and LearningRateMonitor ask for momentum there.

    ``betas`` stays out: with it they would read and write ``betas`` of every group and miss Muon's momentum.
    """
    shared: dict[str, Any] = {}
    for child in optimizers.values():
        shared.update({key: child.defaults[key] for key in ("lr", "momentum") if key in child.defaults})
    for child in optimizers.values():
        if "betas" in child.defaults:
            shared.setdefault("momentum", child.defaults["betas"][0])
    return shared


def _set_momentum(group: dict[str, Any]) -> None:
    """Every group gets a momentum, for logging, so that none takes another child's from the shared defaults."""
    group.setdefault("momentum", group["betas"][0] if "betas" in group else 0.0)


def _set_param_names(group: dict[str, Any], partition: Partition | None) -> None:
    """Every group gets names: states are loaded by name, and torch wants all groups or none to have them."""
    if "param_names" not in group:
        known = {} if partition is None else {id(entry.parameter): entry.name for entry in partition}
        parameters = enumerate(group["params"])
        group["param_names"] = [known.get(id(p), f"{group['name']}[{index}]") for index, p in parameters]


def _build(factory: OptimizerFactory, groups: list[dict[str, Any]], owner: str) -> Optimizer:
    allowed = {"params", "param_names", "name", "layouts"}
    options = {key for group in groups for key in group} - allowed
    for group in groups:
        _check_options(group)
    optimizer = foreign.construct(factory, groups, owner)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{factory!r} returned {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    unknown = sorted(options - set(optimizer.defaults))
    if unknown:
        raise ValueError(
            f"A rule sets {', '.join(unknown)}, which {type(optimizer).__name__} does not have. Its options: "
            f"{', '.join(sorted(optimizer.defaults))}."
        )
    for group in optimizer.param_groups:
        group.pop("layouts", None)
    return optimizer


def _check_options(group: dict[str, Any]) -> None:
    """Optimizers of torch check their defaults but not the options of a group."""
    for key in ("lr", "weight_decay"):
        value = group.get(key, 0.0)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, Tensor) and not (number and 0.0 <= value < math.inf):
            raise ValueError(
                f"A rule sets {key}={value!r} for the group {group['name']!r}: it must be a finite number of 0 or more."
            )
