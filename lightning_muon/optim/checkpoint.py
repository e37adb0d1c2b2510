"""Loading of optimizer states by parameter name, without loss of precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.optim.arguments import OPTIMIZER_KEY, class_label
from lightning_muon.optim.routing import Routing
from lightning_muon.optim.stacks import MatrixStack
from lightning_muon.partition.names import some_names


@dataclass
class LoadingGroup:
    """A saved param group, with the parameters of this optimizer that it belongs to.

    Args:
        owner: name of the child that has the group.
        name: name of the group.
        params: the parameters.
        param_names: names of the parameters.
        ids: keys of the parameters in the saved state.
        options: all other entries of the saved group.
    """

    owner: str
    name: str
    params: list[Tensor]
    param_names: list[str]
    ids: list[Any]
    options: dict[str, Any]

    def saved(self) -> dict[str, Any]:
        """The group in the form of a saved state, with ids instead of parameters."""
        return {**self.options, "name": self.name, "params": self.ids, "param_names": self.param_names}

    def live(self) -> dict[str, Any]:
        """The group in the form of ``param_groups``, with parameters."""
        return {**self.saved(), "params": self.params}


def match_groups(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], routing: Routing
) -> list[LoadingGroup]:
    """Find the parameters of each saved group, by name.

    A saved group may hold parameters that are in another group of the same child now, or that are frozen and in no
    group. A frozen parameter that is not in the state leaves its group. Repeated names are matched by their positions.
    States without names, as torch saves them, are matched by order.

    Args:
        state_dict: result of ``HybridOptimizer.state_dict()``; not modified.
        groups: the named param groups of the hybrid that loads it.
        routing: routing of the hybrid, which knows its children and frozen parameters.

    Raises:
        TypeError: if the state is not a dict.
        ValueError: if it is not an optimizer state, or if a parameter is missing, unexpected or in a group of another
            child.
    """
    saved_groups = check_form(state_dict)
    if not all("param_names" in group and "name" in group for group in saved_groups if group["params"]):
        return _match_by_place(saved_groups, groups, routing)
    saved_groups = [group for group in saved_groups if "name" in group]
    repeated = _repeated_names(saved_groups, groups)
    here = {
        key: (parameter, group["name"])
        for group in groups
        for key, parameter in zip(_keys(group, repeated), group["params"], strict=True)
    }
    joining = {entry.name: entry for entry in routing.waiting}
    known = {entry.parameter for entry in routing.partition or ()}
    found: list[LoadingGroup] = []
    seen = set()
    unexpected, moved = [], []
    for saved in saved_groups:
        wanted = routing.owner_by_name(saved["name"])
        members: list[tuple[Tensor, str, Any]] = []
        for key, name, saved_id in zip(_keys(saved, repeated), saved["param_names"], saved["params"], strict=True):
            seen.add(key)
            if key in here:
                parameter, group_name = here[key]
                owner = routing.owner_by_name(group_name)
            elif name in joining:
                parameter, group_name = joining[name].parameter, joining[name].group_name
                owner = joining[name].group
            else:
                unexpected.append(name)
                continue
            wanted = wanted or owner
            if owner != wanted:
                moved.append(f"{name!r} from {saved['name']!r} to {group_name!r}")
            members.append((parameter, name, saved_id))
        if wanted is not None:
            params, names, ids = (list(column) for column in zip(*members, strict=True)) if members else ([], [], [])
            found.append(LoadingGroup(wanted, saved["name"], params, names, ids, _options(saved)))
    missing = [
        name
        for group in groups
        for key, name, parameter in zip(_keys(group, repeated), group["param_names"], group["params"], strict=True)
        if key not in seen and (parameter.requires_grad or parameter not in known)
    ]
    _refuse_other_membership(unexpected, missing, moved)
    return [_in_order_of(groups, group) for group in found]


def check_form(state_dict: Any) -> list[dict[str, Any]]:
    """Check the form of a saved state and return its param groups.

    Raises:
        TypeError: if it is not a dict.
        ValueError: if it is not an optimizer state.
    """
    problem = None
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        keys = f" with {', '.join(map(repr, state_dict))}" if isinstance(state_dict, Mapping) else ""
        problem = f"{type(state_dict).__name__}{keys}"
    elif not isinstance(state_dict["state"], Mapping):
        problem = f"one whose 'state' is {type(state_dict['state']).__name__}"
    elif not isinstance(state_dict["param_groups"], list):
        problem = f"one whose 'param_groups' is {type(state_dict['param_groups']).__name__}"
    else:
        for group in state_dict["param_groups"]:
            if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
                problem = "one with a param group that has no list of 'params'"
            elif "param_names" in group and len(group["param_names"]) != len(group["params"]):
                problem = (
                    f"one whose group {group.get('name')!r} has {len(group['params'])} parameters and "
                    f"{len(group['param_names'])} names"
                )
        if problem is None and not all(isinstance(value, Mapping) for value in _states(state_dict)):
            problem = "one whose 'state' holds something other than a dict for a parameter"
    if problem is not None:
        kind = ValueError if isinstance(state_dict, Mapping) else TypeError
        raise kind(
            f"An optimizer loads what state_dict() returned, a dict of 'state' and 'param_groups'; got {problem}."
        )
    return list(state_dict["param_groups"])


def check_class(saved_options: Mapping[str, Any], optimizer: Optimizer, what: str) -> None:
    """Check that a state was saved by an optimizer of the same class.

    A class of the same name in another module, such as a renamed script, passes if it has the same options.

    Args:
        saved_options: entries of the saved group. States of older versions do not contain the class, and pass.
        optimizer: the optimizer that loads the state.
        what: name of the param group, for the error.

    Raises:
        ValueError: if another class saved the state.
    """
    saved, kind = saved_options.get(OPTIMIZER_KEY), class_label(optimizer)
    if not isinstance(saved, str) or saved == kind:
        return
    same_name = name_of_class(saved) == name_of_class(kind)
    if same_name and set(optimizer.defaults) <= set(saved_options):
        return
    one, other = (saved, kind) if same_name else (name_of_class(saved), name_of_class(kind))
    raise ValueError(
        f"The optimizer state of {what} was saved by {one}, and {other} cannot go on with it: their states mean "
        f"different things. Choose {one} again, or load the weights alone and let {other} start anew (Lightning: "
        "Module.load_from_checkpoint(path), then fit without ckpt_path)."
    )


def check_classes(saved: Sequence[dict[str, Any]], optimizer: Optimizer) -> None:
    """Call :func:`check_class` for all groups of a state."""
    for group in saved:
        check_class(group, optimizer, repr(group["name"]) if "name" in group else "these parameters")


def check_entries(
    loaded: Mapping[Tensor, set[str]],
    stacks: Iterable[MatrixStack],
    optimizer: Optimizer,
    saved: Sequence[dict[str, Any]],
) -> None:
    """Check that a loaded state has the entries of a rule.

    Args:
        loaded: names of the loaded entries, by parameter.
        stacks: the stacks of these parameters, bound to the state.
        optimizer: the rule.
        saved: param groups of the state, which contain the class that saved it.

    Raises:
        ValueError: if the entries of a parameter differ from those of the rule.
    """
    kept: dict[Tensor, set[str]] = {}
    members = [(member, stack) for stack in stacks for member in stack.members]
    for member, stack in members:
        kept.setdefault(member.parameter, set()).update(map(member.state_key, stack.state))
    kind = type(optimizer).__name__
    for member, _ in members:
        found, own = loaded.get(member.parameter), kept[member.parameter]
        if found is not None and found != own:
            rules = sorted({name_of_class(group[OPTIMIZER_KEY]) for group in saved if OPTIMIZER_KEY in group})
            raise ValueError(
                f"The state to load for {member.name!r} has {', '.join(sorted(found))}, but {kind} keeps "
                f"{', '.join(sorted(own)) or 'no state'}: it was saved by another rule"
                f"{', ' + ' and '.join(rules) if rules else ''}. Choose that one again, or load the weights alone and "
                f"let {kind} start anew."
            )


def name_of_class(label: str) -> str:
    """The class name in a label of :func:`class_label`: ``"AdamW"`` for ``"torch.AdamW"``."""
    return label.split(".", 1)[-1]


def state_of(state_dict: Mapping[str, Any], ids: Iterable[Any], all_ids: Iterable[Any]) -> dict[Any, Any]:
    """The saved state of some parameters, and all entries that belong to no parameter.

    Args:
        state_dict: result of ``HybridOptimizer.state_dict()``.
        ids: keys of these parameters in the state.
        all_ids: keys of all parameters.
    """
    others = set(all_ids).difference(ids)
    return {key: value for key, value in state_dict["state"].items() if key not in others}


def restore_exactly(optimizer: Optimizer, state_dict: dict[str, Any], groups: Iterable[dict[str, Any]]) -> None:
    """Replace the state that ``Optimizer.load_state_dict`` loaded for the parameters of ``groups`` by exact copies.

    The base class casts the state to the dtype of the parameters: float32 state of bfloat16 parameters would lose
    precision on each resume. It also keeps the given tensors: later steps would write into ``state_dict``.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    saved_ids = (saved_id for group in state_dict["param_groups"] for saved_id in group["params"])
    wanted = {parameter for group in groups for parameter in group["params"]}
    for saved_id, parameter in zip(saved_ids, parameters, strict=True):
        if parameter not in wanted or saved_id not in state_dict["state"]:
            continue
        for key, value in state_dict["state"][saved_id].items():
            if isinstance(value, Tensor):
                device = optimizer.state[parameter][key].device
                optimizer.state[parameter][key] = value.to(device, copy=True)


def _states(state_dict: Mapping[str, Any]) -> Iterable[Any]:
    """The states of parameters."""
    ids = {saved_id for group in state_dict["param_groups"] for saved_id in group["params"]}
    return (value for key, value in state_dict["state"].items() if key in ids)


def _match_by_place(
    saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], routing: Routing
) -> list[LoadingGroup]:
    sizes, saved_sizes = ([len(group["params"]) for group in some] for some in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"The optimizer state was saved by another optimizer: it has param groups of {saved_sizes} parameters "
            f"without names, and this one has groups of {sizes}. Load the weights alone and let this one start anew "
            "(Lightning: Module.load_from_checkpoint(path), then fit without ckpt_path)."
        )
    return [
        LoadingGroup(
            routing.owner(group),
            group["name"],
            list(group["params"]),
            list(group["param_names"]),
            list(saved["params"]),
            _options(saved),
        )
        for group, saved in zip(groups, saved_groups, strict=True)
    ]


def _repeated_names(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> set[str]:
    """Names of several parameters in the optimizer or in the state. Checks that their positions agree."""
    repeated = {
        name
        for some in (saved_groups, groups)
        for name, count in Counter(name for group in some for name in group.get("param_names", ())).items()
        if count > 1
    }
    lists, saved_lists = (
        {group["name"]: list(group["param_names"]) for group in some if repeated.intersection(group["param_names"])}
        for some in (groups, (group for group in saved_groups if "param_names" in group))
    )
    if lists != saved_lists:
        names = some_names(sorted(map(repr, repeated)), 4)
        raise ValueError(
            f"Several parameters are called {names}, so that only their places in the param "
            "groups tell them apart, and these differ between the optimizer and its saved state. Give each parameter "
            "a name of its own, e.g. by named_parameters() of the module that holds them all."
        )
    return repeated


def _keys(group: Mapping[str, Any], repeated: set[str]) -> list[Any]:
    """Unique keys of the parameters of a group: their names, or (group, position) for repeated names."""
    names = group.get("param_names", ())
    return [(group["name"], index) if name in repeated else name for index, name in enumerate(names)]


def _options(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if key not in ("params", "param_names", "name")}


def _in_order_of(groups: Sequence[dict[str, Any]], loading: LoadingGroup) -> LoadingGroup:
    """Sort the parameters as in the current group of this name, if it has the same parameters."""
    for group in groups:
        if group["name"] == loading.name and set(group["params"]) == set(loading.params):
            ids = dict(zip(loading.params, loading.ids, strict=True))
            names = dict(zip(loading.params, loading.param_names, strict=True))
            loading.params = list(group["params"])
            loading.param_names = [names[parameter] for parameter in loading.params]
            loading.ids = [ids[parameter] for parameter in loading.params]
    return loading


def _refuse_other_membership(unexpected: list[str], missing: list[str], moved: list[str]) -> None:
    problems = []
    if unexpected:
        problems.append(f"not in this model's optimizer: {some_names(sorted(map(repr, unexpected)), 4)}")
    if missing:
        problems.append(f"not in the checkpoint: {some_names(sorted(map(repr, missing)), 4)}")
    if moved:
        problems.append(f"moved: {some_names(sorted(moved), 4)}")
    if problems:
        raise ValueError(
            f"The optimizer state was saved with another partition; {'; '.join(problems)}. Use the parameter rules and "
            "the frozen parameters of the run that saved it, or load the weights alone."
        )
