"""A rule of your own, in one method: RMNP (arXiv 2603.20527).

lightning-muon fit --model examples.plain.Classifier --data examples.plain.RandomTokens \
        --matrix_optimizer examples.custom_rule.RMNP --matrix_optimizer.lr 1e-3 --trainer.max_epochs 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_muon import MomentumOptimizer


class RMNP(MomentumOptimizer):
    """Momentum whose rows are scaled to unit length.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: decay of the moving average of gradients.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        momentum = self.momentum(grad, state, group)
        return torch.nn.functional.normalize(momentum, dim=-1)
