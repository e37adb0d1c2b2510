"""WeightAwareOptimizer: the base class of the rules that compute new weights, not only a direction."""

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
    """Callable that returns the weights of some members of a stack, as a new (B, m, n) tensor in float32 or float64.

    Args:
        stack: the stack.
        members: the members whose weights it reads.
    """

    stack: MatrixStack
    members: list[StackMember]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.members[0].parameter.dtype

    def __call__(self) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.stack.gather(self.members, [member.parameter for member in self.members], dtype)


class WeightAwareOptimizer(MatrixOptimizer):
    r"""Base class of rules that use the weights, or keep them in a set such as the matrices of one norm.

    A rule is a subclass with :meth:`init_state` and :meth:`next_weights`. :meth:`next_weights` returns the weights
    :math:`\bar W` at which the step starts, decayed or rescaled, and the step :math:`\Delta`, which includes the
    learning rate:

    .. math:: W \leftarrow \bar W - \Delta.

    The rule applies the learning rate itself, because the new weights need not be linear in it: for example in a step
    along a sphere, or in one of the lengths and directions of rows.

    Weights are read in float32 at least; parameters of less precision are rounded once, at the end.
    Arguments and errors are those of :class:`MatrixOptimizer`.
    """

    def next_weights(
        self, read_weights: WeightReader, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return (base, step), each (B, m, n). The new weights are base - step. This is the rule.

        Args:
            read_weights: returns the weights (B, m, n), each time a new copy that may be overwritten. To save the
                memory of one copy, delete it before orthogonalization, and read the weights again afterwards.
            grad: gradients (B, m, n) in the state's dtype; a copy that may be overwritten.
            state: the state from :meth:`init_state`; update it in place.
            group: the options of the param group.
        """
        raise NotImplementedError

    def decay_(self, weights: Tensor, step: Tensor, amount: float | Tensor, group: dict[str, Any]) -> Tensor:
        """Multiply weights in place by ``1 - amount``; with ``cautious`` only where the step also shrinks them.

        Args:
            weights: (B, m, n).
            step: (B, m, n), which will be subtracted from the weights.
            amount: usually learning rate times weight decay; a number, or a tensor that broadcasts to (B, m, n).
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
