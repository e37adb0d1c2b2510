"""MomentumOptimizer: what a rule of one's own gets from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MomentumOptimizer


class Average(MomentumOptimizer):
    """SGD with momentum, in one method."""

    def __init__(self, params: Any, momentum: float = 0.9, **options: Any) -> None:
        super().__init__(params, {"lr": 1.0, "momentum": momentum, **options}, lr_scale="none")

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return self.momentum(grad, state, group)


@pytest.mark.parametrize("nesterov", [None, False, True])
def test_a_rule_is_one_method(nesterov: bool | None) -> None:
    """The average, and what it looks ahead to, by hand."""
    param = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = Average([param], **({} if nesterov is None else {"nesterov": nesterov}))
    average, position = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for _ in range(3):
        param.grad = torch.randn(3, 2, dtype=torch.float64)
        average = 0.9 * average + 0.1 * param.grad
        position -= 0.9 * average + 0.1 * param.grad if nesterov else average
        optimizer.step()
        torch.testing.assert_close(param.detach(), position)
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], average)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}, {"nesterov": "yes"}])
def test_its_options_are_checked(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=f"{key} must be"):
        Average([nn.Parameter(torch.randn(3, 2))], **options)
