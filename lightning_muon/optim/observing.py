"""StackUpdate: the argument of observers of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from lightning_muon.optim.stacks import StackMember


@dataclass(frozen=True, eq=False)
class StackUpdate:
    """The update of a stack of matrices, before learning rate and weight decay: ``scale`` times ``direction``.

    Args:
        members: the parameters of the stack. ``direction[member.slice]``, of shape (b, m, n), belongs to
            ``member.parameter``, read as matrices by ``member.layout``. If the layout has several views, as for fused
            blocks of different sizes, it belongs to the view ``member.view``. Parameters without an update are left
            out.
        direction: (B, m, n), on the device and in the dtype of the parameters. Do not write to it, because the step
            reads it after the observers. Clone what you keep, because the step may use its memory again.
        scale: the shape scale s(m, n). For a :class:`WeightAwareOptimizer`, whose direction includes the learning rate,
            it is one over the learning rate, or 0 if that is 0.
    """

    members: Sequence[StackMember]
    direction: Tensor
    scale: float


UpdateObserver: TypeAlias = Callable[[StackUpdate], None]
