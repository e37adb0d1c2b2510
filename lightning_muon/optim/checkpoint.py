"""Loading optimizer states: by parameter name, and without loss of precision."""

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


def restore_precision(optimizer: Optimizer, state_dict: dict[str, Any], groups: Iterable[dict[str, Any]]) -> None:
    """Undo the cast of ``Optimizer.load_state_dict`` to the parameters' dtype, for the parameters of ``groups``.

    Float32 state of bfloat16 parameters would otherwise lose bits on each resume.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    saved_ids = (saved_id for group in state_dict["param_groups"] for saved_id in group["params"])
    wanted = {parameter for group in groups for parameter in group["params"]}
    for saved_id, parameter in zip(saved_ids, parameters, strict=True):
        if parameter not in wanted or saved_id not in state_dict["state"]:
            continue
        for key, value in state_dict["state"][saved_id].items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and value.dtype != loaded.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)


def _check_membership(saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]) -> None:
    saved_group = {name: group["name"] for group in saved for name in group["param_names"]}
    current_group = {name: group["name"] for group in current for name in group["param_names"]}
    problems = [f"{name!r} is not in this model's optimizer" for name in saved_group.keys() - current_group.keys()]
    problems += [f"{name!r} is not in the checkpoint" for name in current_group.keys() - saved_group.keys()]
    problems += [
        f"{name!r} was in {saved_group[name]!r} and is in {group!r} now"
        for name, group in current_group.items()
        if saved_group.get(name, group) != group
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(
            f"The optimizer state was saved with another partition: {shown}. Use the parameter rules and the frozen "
            "parameters of "
            "the run that saved it, or load the weights alone."
        )
