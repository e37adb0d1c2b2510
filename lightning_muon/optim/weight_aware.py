"""WeightAwareOptimizer: the base of the rules that decide about the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.apply import split_like
from lightning_muon.optim.matrix import MatrixOptimizer
from lightning_muon.optim.observing import StackUpdate
from lightning_muon.optim.stacks import MatrixStack, StackMember, consecutive


@dataclass(frozen=True)
class WeightReader:
    """Call it for the weights of some members of a stack: a new (B, m, n) tensor, float32 or float64.

    Args:
        stack: the stack.
        members: those whose weights to read.
    """

    stack: MatrixStack
    members: list[StackMember]

    @property
    def dtype(self) -> torch.dtype:
        """In which the parameters are kept."""
        return self.members[0].parameter.dtype

    def __call__(self) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.stack.gather(self.members, [member.parameter for member in self.members], dtype)


class WeightAwareOptimizer(MatrixOptimizer):
    r"""Base of rules that look at the weights, or put them back onto a set such as the matrices of one norm.

    A rule is a subclass with :meth:`init_state` and :meth:`next_weights`, which answers with the weights
    :math:`\bar W` that the step starts from, decayed or rescaled, and the step :math:`\Delta`, learning rate included:

    .. math:: W \leftarrow \bar W - \Delta.

    The learning rate is the rule's to apply, because the new weights need not be linear in it: a step along a sphere,
    or of the lengths and the directions of rows, is not.

    Weights are read in float32 at least; parameters of less precision are rounded once, at the end.
    Arguments and errors are those of :class:`MatrixOptimizer`.
    """

    def next_weights(
        self, read_weights: WeightReader, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The rule: (base, step), each (B, m, n), from which the new weights are base - step.

        Args:
            read_weights: returns the weights (B, m, n); each time a copy that may be overwritten. A rule that lets go
                of one before it orthogonalizes, and reads again, saves a stack of memory.
            grad: gradients (B, m, n) in the state's dtype; a copy that may be overwritten.
            state: what :meth:`init_state` returned, to be updated in place.
            group: the options of the param group.
        """
        raise NotImplementedError

    def decay_(self, weights: Tensor, step: Tensor, amount: float | Tensor, group: dict[str, Any]) -> Tensor:
        """Shrink weights in place by ``amount`` of themselves, with ``cautious`` only where the step shrinks them too.

        Args:
            weights: (B, m, n).
            step: (B, m, n), what will be subtracted.
            amount: how much, usually learning rate times weight decay; a number or a tensor that broadcasts.
            group: the options of the param group.
        """
        if isinstance(amount, (int, float)) and amount == 0.0:
            return weights
        if group["cautious"]:
            amount = amount * (step * weights >= 0).to(weights.dtype)
        return weights.mul_(1 - amount)

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no direction of the gradient alone: it has next_weights.")

    def _move(
        self, stack: MatrixStack, members: list[StackMember], state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        read_weights = WeightReader(stack, members)
        base, step = self.next_weights(read_weights, stack.gather_grads(members), state, group)
        for answer in (base, step):
            self._check_answer("next_weights", answer, members, stack)
        targets = [member.target(member.parameter) for member in members]
        if self._observers:
            lr = float(group["lr"])
            self._tell(StackUpdate(consecutive(members), step.to(targets[0].dtype), 1 / lr if lr > 0 else 0.0))
        for target, new in zip(targets, split_like(base.sub_(step), members, targets), strict=True):
            target.copy_(new)
