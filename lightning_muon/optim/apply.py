"""Application of a step to the parameters: split the direction, decay the weights, subtract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_muon.optim.stacks import StackMember


def split_like(direction: Tensor, members: list[StackMember], targets: list[Tensor]) -> list[Tensor]:
    """Split (B, m, n) into one tensor per member, in the shape of its target."""
    if all(member.plain for member in members):
        return list(direction.unbind(0))
    parts = torch.split(direction, [member.count for member in members])
    return [part.reshape(target.shape) for part, target in zip(parts, targets, strict=True)]


def decay(targets: list[Tensor], updates: list[Tensor], amount: float | Tensor, cautious: bool) -> None:
    """Multiply the targets by ``1 - amount``; if cautious, only elements that the update does not enlarge."""
    if cautious:
        decay_by(targets, updates, [amount] * len(targets), cautious)
    elif targets[0].is_cuda and not isinstance(amount, Tensor):
        torch._foreach_mul_(targets, 1 - amount)
    else:
        # On a CPU the foreach form copies each target, and converts a Python number again for each target.
        factor = torch.as_tensor(1 - amount, dtype=torch.promote_types(targets[0].dtype, torch.float32))
        for target in targets:
            target.mul_(factor)


def decay_by(targets: list[Tensor], updates: list[Tensor], amounts: Sequence[float | Tensor], cautious: bool) -> None:
    """Multiply each target by 1 minus its own amount, a number or a tensor."""
    for target, update, amount in zip(targets, updates, amounts, strict=True):
        if cautious:  # in float32 at least: in bfloat16 a factor of 0.999 is 1
            amount = amount * (update * target >= 0).to(torch.promote_types(target.dtype, torch.float32))
        target.mul_(1 - amount)


def subtract(targets: list[Tensor], updates: list[Tensor], amount: float | Tensor) -> None:
    """Subtract ``amount`` times its update from each target."""
    if isinstance(amount, Tensor):
        torch._foreach_sub_(targets, torch._foreach_mul(updates, amount.to(targets[0].device, targets[0].dtype)))
    else:
        torch._foreach_add_(targets, updates, alpha=-amount)
