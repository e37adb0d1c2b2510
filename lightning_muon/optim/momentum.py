"""MomentumOptimizer: the base class of the rules with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.arguments import check_choice, check_fraction
from lightning_muon.optim.matrix import MatrixOptimizer


class MomentumOptimizer(MatrixOptimizer):
    """Base class of rules with a moving average of the gradients, ``momentum_buffer``: one element per weight.

    A rule is a subclass whose :meth:`~MatrixOptimizer.direction` calls :meth:`momentum`. Its defaults include
    ``momentum``, and may include ``nesterov``. Arguments and errors are those of :class:`MatrixOptimizer`.
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
        r"""Update and return the moving average :math:`M \leftarrow \mu M + (1-\mu) G`.

        If ``nesterov`` is set, the result is :math:`\mu M + (1-\mu) G` with the new :math:`M`. The result uses the
        memory of ``grad`` and may be overwritten; ``state["momentum_buffer"]`` is updated in place.
        """
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        return grad.lerp_(buffer, group["momentum"]) if group.get("nesterov") else grad.copy_(buffer)
