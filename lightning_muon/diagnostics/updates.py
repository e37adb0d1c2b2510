"""The updates of one step of any optimizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_muon.optim import StackUpdate
from lightning_muon.optim.stacks import consecutive

_DECOUPLED = re.compile(r"AdamW|Lion|^Adafactor$|^Muon$")
"""Classes with decoupled weight decay, lr * weight_decay, that have no option for it."""


class UpdateCapture:
    """Collects what the next step of an optimizer subtracts from parameters, up to a factor a parameter.

    Made between the backward pass and the step. Optimizers that show their updates (``observe_updates``) are asked:
    their stacks are kept as the step had them. For others the weights are copied and compared after the step, less the
    weight decay where it is decoupled, that is, no part of the gradient. Parameters without a gradient do not move and
    are left out. Of several steps before :meth:`close` the first counts.

    Args:
        optimizer: the optimizer that is about to step.
        parameters: whose updates to collect.
    """

    def __init__(self, optimizer: Optimizer, parameters: Collection[Tensor]) -> None:
        self.stepped = False
        self.stacks: list[StackUpdate] = []
        """Copies of the directions of matrix optimizers, for the requested parameters, with a scale of 1."""
        self.differences: dict[Tensor, Tensor] = {}
        """What other optimizers subtracted, in the shapes of the parameters."""
        self.rounded = False
        """Whether updates are differences of weights in half precision, which rounding dominates."""
        self.unknown: set[str] = set()
        """Names of optimizers whose measured updates contain weight decay, because their kind of decay is not known."""
        self._parameters = parameters
        self._seen: set[Tensor] = set()
        self._before: dict[Tensor, tuple[Tensor, float]] = {}
        self._handles: list[RemovableHandle] = [optimizer.register_step_post_hook(self._after_step)]
        for child in _children(optimizer):
            self._watch(child)

    def close(self) -> None:
        """Remove the observers from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()

    def in_shape_of(self, parameter: Tensor) -> Tensor | None:
        """The update of a parameter in its shape, assembled from stacks if necessary; None if it did not change."""
        found = self.differences.get(parameter)
        blocks = {
            member.view: (member.layout, stack.direction[member.slice])
            for stack in self.stacks
            for member in stack.members
            if member.parameter is parameter
        }
        if found is None and blocks:
            layout, _ = blocks[0]
            found = layout.write([blocks[view][1] for view in sorted(blocks)], parameter.shape)
        return found

    def _watch(self, optimizer: Optimizer) -> None:
        observe = getattr(optimizer, "observe_updates", None)
        if observe is not None:
            if any(parameter in self._parameters for group in optimizer.param_groups for parameter in group["params"]):
                self._handles.append(observe(self._observe))
            return
        for group in optimizer.param_groups:
            shrinkage = _decoupled_decay(optimizer, group)
            if shrinkage is None:
                self.unknown.add(type(optimizer).__name__)
                shrinkage = 0.0
            for parameter in group["params"]:
                if parameter in self._parameters and parameter.grad is not None:
                    self._before[parameter] = (parameter.detach().clone(), shrinkage)

    def _observe(self, update: StackUpdate) -> None:
        members = [m for m in update.members if m.parameter in self._parameters and m.parameter not in self._seen]
        if not members:
            return
        direction = update.direction
        if len(members) < len(update.members):
            direction = torch.cat([direction[member.slice] for member in members])
        self.stacks.append(StackUpdate(consecutive(members), direction * update.scale, 1.0))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        overflowed = getattr(optimizer, "found_inf", None)  # fused ones under a gradient scaler skip by themselves
        if overflowed is not None and bool(overflowed):
            return
        self.stepped = True
        self._seen.update(member.parameter for stack in self.stacks for member in stack.members)
        for parameter, (before, shrinkage) in self._before.items():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self.differences[parameter] = before.to(dtype).mul_(1 - shrinkage).sub_(parameter.detach())
            self.rounded = self.rounded or parameter.dtype != dtype
        self._before.clear()


def _children(optimizer: Optimizer) -> Iterable[Optimizer]:
    """The optimizers that a hybrid holds, or the optimizer itself."""
    children = getattr(optimizer, "optimizers", None)
    return children.values() if isinstance(children, dict) else [optimizer]


def _decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float | None:
    """The fraction of the weights that decoupled decay removes in a step; None where it is not known."""
    weight_decay, lr = group.get("weight_decay"), group.get("lr")
    if not weight_decay:
        return 0.0
    kind = type(optimizer)
    said = group.get("decoupled_weight_decay", group.get("weight_decouple"))
    decoupled = bool(_DECOUPLED.search(kind.__name__)) if said is None else said
    of_torch = kind.__module__.startswith("torch.optim")
    if not decoupled and (said is not None or of_torch):
        return 0.0  # part of the gradient
    # Prodigy, D-Adaptation and schedule-free optimizers decay by more than the learning rate.
    adapts = ("d" in group and not of_torch) or "ScheduleFree" in kind.__name__
    if not decoupled or lr is None or adapts:
        return None
    return float(weight_decay) * (1.0 if group.get("fixed_decay") else float(lr))
