"""Checks of the gradients before a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.arguments import parameter_names


def check_dense(groups: Iterable[dict[str, Any]]) -> None:
    """Raise ``RuntimeError`` for a sparse gradient in these param groups."""
    for group in groups:
        for parameter, name in zip(group["params"], parameter_names(group), strict=True):
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise RuntimeError(
                    f"The gradient of {name!r} is sparse: matrix optimizers need dense gradients. Use sparse=False in "
                    "the module that made it, or torch.optim.SparseAdam for this parameter."
                )


def nonfinite_parameters(groups: Iterable[dict[str, Any]]) -> set[Tensor]:
    """Parameters to leave out of the step because of NaN or infinity, by the ``nonfinite`` of their groups.

    Raises:
        FloatingPointError: if a gradient has NaN or infinity in a group whose ``nonfinite`` is ``"raise"``.
    """
    watched = [
        (parameter.grad, parameter, name, group["nonfinite"])
        for group in groups
        if group["nonfinite"] != "propagate"
        for parameter, name in zip(group["params"], parameter_names(group), strict=True)
        if parameter.grad is not None
    ]
    if not watched:
        return set()
    device = watched[0][0].device
    finite = torch.stack([grad.isfinite().all().to(device) for grad, *_ in watched])
    bad = [entry for entry, ok in zip(watched, finite.tolist(), strict=True) if not ok]
    raising = [name for _, _, name, policy in bad if policy == "raise"]
    if raising:
        raise FloatingPointError(
            f"NaN or infinity in the gradient of {', '.join(raising)}. Lower the learning rate, clip by norm, or set "
            "nonfinite='skip' to leave such parameters out of the step."
        )
    return {parameter for _, parameter, *_ in bad}
