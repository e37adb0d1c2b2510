"""OrthogonalizingOptimizer: what a rule of one's own gets from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import OrthogonalizingOptimizer


class Plain(OrthogonalizingOptimizer):
    """The polar factor of the gradient."""

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options}, lr_scale="none")

    def init_state(self, weights: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return self.orthogonalize(grad, group)


def moved(optimizer: OrthogonalizingOptimizer, param: nn.Parameter) -> Tensor:
    before = param.detach().clone()
    param.grad = torch.randn(param.shape)
    optimizer.step()
    return torch.linalg.svdvals((before - param.detach()) / 0.1)


def test_a_rule_needs_no_options() -> None:
    """Nor a weight decay, nor the names that the base gives to arguments."""
    param = nn.Parameter(torch.randn(6, 4))
    values = moved(Plain([param]), param)
    assert float(values.max()) < 1.3
    assert float(values.min()) > 0.6


def test_its_options_say_how() -> None:
    param = nn.Parameter(torch.randn(6, 4))
    values = moved(Plain([param], method="svd", steps=None, orthogonalize_dtype=torch.float32), param)
    torch.testing.assert_close(values, torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "'qr'"),
        ({"steps": 0}, "steps"),
        ({"orthogonalize_dtype": "int8"}, "orthogonalize_dtype must be a floating-point dtype"),
        ({"momentum": 1.0}, "momentum must be a number from 0 to below 1"),
    ],
)
def test_its_options_are_checked(options: dict[str, Any], message: str) -> None:
    whole = {"method": "jordan", "steps": None, "orthogonalize_dtype": None, **options}
    with pytest.raises(ValueError, match=message):
        Plain([nn.Parameter(torch.randn(6, 4))], **whole)


def test_a_param_group_holds_the_name_of_a_dtype() -> None:
    """So that a checkpoint loads with weights_only=True."""
    optimizer = Plain([nn.Parameter(torch.randn(6, 4))], method="svd", steps=None, orthogonalize_dtype=torch.float64)
    assert optimizer.param_groups[0]["orthogonalize_dtype"] == "float64"
