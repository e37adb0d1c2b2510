"""MomentumOptimizer: the base of the rules that average gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.arguments import check_choice, check_fraction
from lightning_muon.optim.matrix import MatrixOptimizer


class MomentumOptimizer(MatrixOptimizer):
    """Base of rules with a moving average of the gradients, ``momentum_buffer``: one element per weight.

    A rule is a subclass with :meth:`~MatrixOptimizer.direction`, in which it calls :meth:`momentum`, and with
    ``momentum`` among its defaults; ``nesterov`` may be there too.
    Arguments and errors are those of :class:`MatrixOptimizer`.
    """

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if "momentum" in group:
            check_fraction(group, "momentum")
        if "nesterov" in group:
            check_choice(group, "nesterov", (False, True))

    def init_state(self, stack: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(stack)}

    def momentum(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        r"""Moving average :math:`M \leftarrow \mu M + (1-\mu) G`, looking ahead if the group has ``nesterov``.

        Updates ``state["momentum_buffer"]``. The result has the memory of ``grad`` and may be overwritten.
        """
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        return grad.lerp_(buffer, group["momentum"]) if group.get("nesterov") else grad.copy_(buffer)
