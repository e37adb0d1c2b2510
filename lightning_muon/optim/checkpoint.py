"""Loading optimizer states: by parameter name, and exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def match_by_name(state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Reorder a saved optimizer state so that its groups and parameters stand where ``param_groups`` has them.

    Args:
        state_dict: what ``Optimizer.state_dict()`` returned; not modified.
        param_groups: of the optimizer that loads it. A state without names is taken in the order it has, and gets them.

    Raises:
        ValueError: if a parameter is missing, unexpected or in another group; names them and says what to do.
    """
    saved_groups = state_dict["param_groups"]
    if not all("param_names" in group and "name" in group for group in (*saved_groups, *param_groups)):
        labels = [{key: group[key] for key in ("name", "param_names") if key in group} for group in param_groups]
        return {
            **state_dict,
            "param_groups": [{**own, **saved} for own, saved in zip(labels, saved_groups, strict=False)],
        }
    _check_membership(saved_groups, param_groups)
    by_name = {group["name"]: group for group in saved_groups}
    reordered = []
    for group in param_groups:
        saved = by_name[group["name"]]
        ids = dict(zip(saved["param_names"], saved["params"], strict=True))
        names = list(group["param_names"])
        reordered.append({**saved, "params": [ids[name] for name in names], "param_names": names})
    return {**state_dict, "param_groups": reordered}


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


def _check_membership(saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]) -> None:
    saved_group = {name: group["name"] for group in saved for name in group["param_names"]}
    current_group = {name: group["name"] for group in current for name in group["param_names"]}
    problems = []
    for which, names in (
        ("not in this model's optimizer", saved_group.keys() - current_group.keys()),
        ("not in the checkpoint", current_group.keys() - saved_group.keys()),
    ):
        if names:
            problems.append(f"{which}: {_some(map(repr, names))}")
    moved = [
        f"{name!r} from {saved_group[name]!r} to {group!r}"
        for name, group in current_group.items()
        if saved_group.get(name, group) != group
    ]
    if moved:
        problems.append(f"moved: {_some(moved)}")
    if problems:
        raise ValueError(
            f"The optimizer state was saved with another partition; {'; '.join(problems)}. Use the parameter rules and "
            "the frozen parameters of the run that saved it, or load the weights alone."
        )


def _some(texts: Iterable[str], limit: int = 4) -> str:
    ordered = sorted(texts)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest
