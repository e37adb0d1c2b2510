"""Support for optimizers of other packages in a hybrid optimizer."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.optim.matrix import MatrixOptimizer


def construct(
    factory: Callable[[list[dict[str, Any]]], Optimizer], groups: list[dict[str, Any]], owner: str
) -> Optimizer:
    """Call ``factory`` with param groups, and check the result.

    Some optimizers, such as Muon of pytorch-optimizer, need ``use_muon`` in each group; this function adds it.

    Raises:
        TypeError: if the optimizer cannot be part of a hybrid; see :func:`check_child`.
        Exception: if the factory raises. The message then names the optimizer, and a note says what a factory must
            accept.
    """
    try:
        optimizer = factory(groups)
    except Exception as error:
        told = any("use_muon" in group for group in groups)
        if isinstance(error, ValueError) and "use_muon" in str(error) and not told:
            return construct(factory, [{**group, "use_muon": owner == "matrix"} for group in groups], owner)
        _name_owner(error, owner, _class_name(factory))
        if not _is_ours(error):
            error.add_note(
                f"{_class_name(factory) or repr(factory)} cannot be the optimizer of {owner!r}, which is made from a "
                "list of param groups and nothing else. If it wraps another optimizer, takes the model, knows no param "
                "groups or runs on other hardware only, choose one that does not."
            )
        raise
    if isinstance(optimizer, Optimizer):
        check_child(owner, optimizer)
    return optimizer


def check_child(name: str, child: Optimizer) -> None:
    """Check that an optimizer can be stepped, saved and resumed as part of a hybrid.

    Raises:
        TypeError: if the optimizer wraps another one, or if its step needs a closure.
    """
    kind = type(child).__name__
    wrapped = _wrapped_optimizer(child)
    if wrapped is not None:
        inner = type(wrapped).__name__
        raise TypeError(
            f"The child {name!r} is {kind}, a wrapper of {inner}, whose state and closures a hybrid cannot reach. "
            f"Give {inner} itself instead."
        )
    if _needs_closure(child):
        raise TypeError(
            f"The child {name!r} is {kind}, whose step must evaluate the model by itself, maybe several times: a "
            "hybrid evaluates it once, for all children. Choose an optimizer that goes by the gradients alone."
        )


def check_together(optimizers: Mapping[str, Optimizer]) -> None:
    """Check that the children can be in one hybrid.

    Raises:
        TypeError: if several differentiate the gradients.
    """
    names = [name for name, child in optimizers.items() if differentiates_gradients(child)]
    if len(names) > 1:
        kinds = ", ".join(type(optimizers[name]).__name__ for name in names)
        raise TypeError(
            f"The children {' and '.join(map(repr, names))} both differentiate the gradients ({kinds}), which the step "
            "of the first makes impossible for the second. Send all their parameters to one of them, e.g. by "
            f"ParameterRule(pattern='*', group={names[0]!r})."
        )


def differentiates_gradients(optimizer: Optimizer) -> bool:
    """Whether the step estimates the Hessian from gradients of ``backward(create_graph=True)``: SophiaH, AdaHessian."""
    return "hessian" in inspect.signature(optimizer.step).parameters


def flags_of(child: Optimizer) -> set[str]:
    """Keys in the param groups of an optimizer of another package that are not in its ``defaults``."""
    held = {key for group in child.param_groups for key in group}
    return held - child.defaults.keys() - {"momentum"} if child.defaults else held


def has_modes(optimizer: Optimizer) -> bool:
    """Whether the optimizer has ``train()`` and ``eval()``, which swap the weights, as schedule-free optimizers do."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def extra_entries(child: Optimizer) -> dict[str, Any]:
    """Entries of the ``state_dict`` of a child besides ``state`` and ``param_groups``, e.g. SPAM's warm-up."""
    with _by_itself(child):
        state_dict = child.state_dict()
    return {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}


def counts_in_groups(child: Optimizer) -> bool:
    """Whether the param groups may hold step counters (``step``, ``k``).

    A parameter that joins late then needs a group of its own. Otherwise its first update would get the bias correction
    of a late step, and would be far too large. torch and this package keep all state per parameter; other packages may
    not.
    """
    return not isinstance(child, MatrixOptimizer) and not type(child).__module__.startswith("torch.optim.")


def add_initial_state(child: Optimizer, group: dict[str, Any]) -> None:
    """Add the initial state of new parameters, for a child that creates state in its constructor, as Adagrad does."""
    if child.state.keys().isdisjoint(group["params"]):
        accepted = inspect.signature(type(child)).parameters
        options = {key: value for key, value in child.defaults.items() if key in accepted}
        fresh = type(child)([{key: value for key, value in group.items() if key != "param_names"}], **options)
        child.state.update(fresh.state)


def loads_its_own_way(child: Optimizer) -> bool:
    """Whether a child of another package overrides ``load_state_dict``, which may change the child in place."""
    return counts_in_groups(child) and type(child).load_state_dict is not Optimizer.load_state_dict


def rehearse_load(child: Optimizer, groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Load a state into a copy of a child of another package, so that an error does not damage the child.

    Args:
        child: the child; not changed.
        groups: the param groups that it will have.
        state_dict: argument of its ``load_state_dict``.

    Raises:
        Exception: if ``load_state_dict`` of the child raises.
    """
    shared = [parameter for group in groups for parameter in group["params"]]
    shared += [value for state in state_dict["state"].values() for value in _tensors(state)]  # large, and only read
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    double = object.__new__(type(child))
    for key, value in vars(child).items():
        vars(double)[key] = type(value)() if key.startswith("_optimizer_") else _copied(value, memo, key)
    double.state = defaultdict(dict)
    double.param_groups = [{**group, "params": list(group["params"])} for group in groups]
    double.load_state_dict(copy.deepcopy(state_dict, memo))


def check_state_shapes(child: Optimizer) -> None:
    """Check the shapes of a loaded state, for optimizers whose state is known to have the shapes of the parameters.

    Raises:
        ValueError: if a state entry does not have the shape of its parameter.
    """
    module, kind = type(child).__module__, type(child).__name__
    if not module.startswith(("torch.optim.", "schedulefree.")) or kind == "Adafactor":
        return
    named = (pair for group in child.param_groups for pair in zip(group["params"], group["param_names"], strict=True))
    for parameter, name in named:
        for key, value in child.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"The optimizer state {key!r} of {name!r} is a tensor of shape {tuple(value.shape)}, but the "
                    f"parameter has shape {tuple(parameter.shape)}. The checkpoint belongs to another model."
                )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a state entry."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _copied(value: Any, memo: dict[int, Any], key: str) -> Any:
    """A deep copy of an attribute; the attribute itself if it is the state or cannot be copied."""
    if key in ("state", "param_groups"):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


@contextmanager
def _by_itself(child: Optimizer) -> Iterator[None]:
    """Context in which the state of a child contains its own parameters only, as outside of a hybrid."""
    shared = child.state
    own = {parameter for group in child.param_groups for parameter in group["params"]}
    child.state = defaultdict(dict, {k: v for k, v in shared.items() if k in own or not isinstance(k, Tensor)})
    try:
        yield
    finally:
        child.state = shared


def _wrapped_optimizer(optimizer: Optimizer) -> Optimizer | None:
    for value in vars(optimizer).values():
        held: Iterable[Any] = (value,)
        if isinstance(value, Mapping):
            held = value.values()
        elif isinstance(value, (list, tuple)):
            held = value
        for item in held:
            if isinstance(item, Optimizer):
                return item
    return None


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` has a required argument, or code that raises ``NoClosureError``."""
    parameters = inspect.signature(optimizer.step).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(parameter.kind in positional and parameter.default is parameter.empty for parameter in parameters):
        return True
    code = getattr(inspect.unwrap(type(optimizer).step), "__code__", None)
    return code is not None and "NoClosureError" in code.co_names  # of pytorch-optimizer


def _class_name(factory: object) -> str | None:
    """Name of the class that a factory makes, if known. jsonargparse passes it as an argument of a ``partial``."""
    parts = [factory.func, *factory.args] if isinstance(factory, functools.partial) else [factory]
    return next((part.__name__ for part in parts if isinstance(part, type)), None)


def _name_owner(error: Exception, owner: str, kind: str | None) -> None:
    """Put the name of the optimizer before the message of an error, unless the message names its class already."""
    if len(error.args) != 1 or not isinstance(error.args[0], str) or (kind is not None and kind in error.args[0]):
        return
    which = f"{owner}_optimizer" if kind is None else f"{owner}_optimizer ({kind})"
    error.args = (f"{which}: {error.args[0]}",)


def _is_ours(error: BaseException) -> bool:
    """Whether code of this package raised the error. Its message needs no note."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("lightning_muon.")
