"""Loading optimizer states: by parameter name, and exactly."""

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
    """A saved param group and the parameters that it is for.

    Args:
        owner: name of the child that has it.
        name: of the group.
        params: the parameters.
        param_names: their names.
        ids: by which the saved state knows them.
        options: what the saved group holds besides.
    """

    owner: str
    name: str
    params: list[Tensor]
    param_names: list[str]
    ids: list[Any]
    options: dict[str, Any]

    def saved(self) -> dict[str, Any]:
        """The group as a child loads it."""
        return {**self.options, "name": self.name, "params": self.ids, "param_names": self.param_names}

    def live(self) -> dict[str, Any]:
        """The group as the child has it."""
        return {**self.saved(), "params": self.params}


def match_groups(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], routing: Routing
) -> list[LoadingGroup]:
    """Find the parameters that each saved group is for, by name.

    A saved group may hold parameters that are in another group of the same child now, or frozen and in none. A frozen
    parameter that the state lacks leaves its group. Names that repeat are matched by their places. States
    without names, as torch saves them, are taken in the order that they have.

    Args:
        state_dict: what ``HybridOptimizer.state_dict()`` returned; not modified.
        groups: the named param groups of the hybrid that loads it.
        routing: of the hybrid: knows children and frozen parameters.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it is no optimizer state, or a parameter is missing, unexpected or in the group of another
            child; names it and says what to do.
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
    """The param groups of a saved state, whose form is checked.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it is no optimizer state.
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
    """Refuse the state of another optimizer class. A class of the same name in another package, such as a script that
    was renamed, passes if it has the same options.

    Args:
        saved_options: what the saved group holds; a state of an older version does not say which class it is of.
        optimizer: the one that loads it.
        what: the param group, for the error.

    Raises:
        ValueError: names both and says what to do.
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
    """:func:`check_class` for all groups of a state."""
    for group in saved:
        check_class(group, optimizer, repr(group["name"]) if "name" in group else "these parameters")


def check_entries(
    loaded: Mapping[Tensor, set[str]],
    stacks: Iterable[MatrixStack],
    optimizer: Optimizer,
    saved: Sequence[dict[str, Any]],
) -> None:
    """Refuse a state that has other entries than a rule keeps.

    Args:
        loaded: names of the loaded entries, by parameter.
        stacks: of these parameters, bound to the state.
        optimizer: the rule.
        saved: param groups of the state, which say what saved it.

    Raises:
        ValueError: names the parameter, both lists of entries, both rules and what to do.
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
    """``"AdamW"`` of :func:`class_label`'s ``"torch.AdamW"``."""
    return label.split(".", 1)[-1]


def state_of(state_dict: Mapping[str, Any], ids: Iterable[Any], all_ids: Iterable[Any]) -> dict[Any, Any]:
    """The saved state of some parameters, with what belongs to no parameter at all.

    Args:
        state_dict: what ``HybridOptimizer.state_dict`` returned.
        ids: by which it knows these parameters.
        all_ids: those of all parameters.
    """
    others = set(all_ids).difference(ids)
    return {key: value for key, value in state_dict["state"].items() if key not in others}


def restore_exactly(optimizer: Optimizer, state_dict: dict[str, Any], groups: Iterable[dict[str, Any]]) -> None:
    """Redo for the parameters of ``groups`` what ``Optimizer.load_state_dict`` did, keeping precision and sharing
    nothing.

    The base class casts state to the parameters' dtype, so that float32 state of bfloat16 parameters would lose bits
    on each resume, and keeps the given tensors, so that later steps would write into ``state_dict``.
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
    """Names that stand for several parameters on either side, once it is sure that their places tell them apart."""
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
    """What tells the parameters of a group apart: their names, or their places where names repeat."""
    names = group.get("param_names", ())
    return [(group["name"], index) if name in repeated else name for index, name in enumerate(names)]


def _options(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if key not in ("params", "param_names", "name")}


def _in_order_of(groups: Sequence[dict[str, Any]], loading: LoadingGroup) -> LoadingGroup:
    """The same with its parameters in the order of the group that has them all now, if there is one."""
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
