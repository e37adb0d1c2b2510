"""What observers of a step are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from lightning_muon.optim.stacks import StackMember


@dataclass(frozen=True, eq=False)
class StackUpdate:
    """What a step subtracts from a stack of matrices, before learning rate and weight decay: scale times direction.

    Args:
        members: whose matrices these are. ``direction[member.slice]``, of shape (b, m, n), belongs to
            ``member.parameter`` as its ``member.layout`` reads it: all of it, or the view ``member.view`` where the
            layout has several, as for fused blocks of different sizes. Parameters that do not move are not among them.
        direction: (B, m, n), on the device and in the dtype of the parameters. It is lent: the step reads it after the
            observers, and may use its memory again. So do not write to it, and clone what is to be kept.
        scale: the shape scale s(m, n). A rule that decides about the weights themselves has the learning rate in its
            direction, and one over it here.
    """

    members: Sequence[StackMember]
    direction: Tensor
    scale: float


UpdateObserver: TypeAlias = Callable[[StackUpdate], None]
