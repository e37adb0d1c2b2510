"""Options that agree over the param groups of a hybrid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lightning_muon.optim import HybridOptimizer, Muon
from lightning_muon.optim.rollback import unchanged_on_error
from lightning_muon.optim.shared_options import FollowedRates, MomentumAlias, default_momentum


def alias(*groups: dict[str, Any]) -> MomentumAlias:
    made = MomentumAlias()
    for group in groups:
        made.add(group)
    made.remember(groups)
    return made


def test_betas_have_a_momentum_and_groups_without_have_none() -> None:
    groups: list[dict[str, Any]] = [{"betas": (0.9, 0.99)}, {}, {"momentum": 0.8}]
    alias(*groups)
    assert [group["momentum"] for group in groups] == [0.9, 0.0, 0.8]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"momentum": 0.7}, (0.7, (0.7, 0.99))),
        ({"betas": (0.6, 0.99)}, (0.6, (0.6, 0.99))),
        ({}, (0.9, (0.9, 0.99))),
    ],
)
def test_whichever_was_set_counts(changed: dict[str, Any], expected: tuple[float, Any]) -> None:
    group: dict[str, Any] = {"betas": (0.9, 0.99)}
    made = alias(group)
    group.update(changed)
    made.carry([group])
    assert (group["momentum"], group["betas"]) == expected
    group["betas"] = (0.5, 0.99)  # and again, from there
    made.carry([group])
    assert group["momentum"] == 0.5


def test_an_optimizer_with_both_keeps_both() -> None:
    class Both(SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1, momentum=0.9)
            self.defaults["betas"] = (0.5, 0.99)
            for group in self.param_groups:
                group["betas"] = (0.5, 0.99)

    first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 4))
    first.grad, second.grad = torch.randn(3), torch.randn(3, 4)
    hybrid = HybridOptimizer({"other": Both([first]), "matrix": Muon([second])})
    hybrid.step()
    assert (hybrid.param_groups[0]["momentum"], hybrid.param_groups[0]["betas"]) == (0.9, (0.5, 0.99))


def test_the_defaults_show_a_momentum_of_its_own_before_one_of_betas() -> None:
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    adamw, muon, adagrad = AdamW(params[:1]), Muon(params[1:2], momentum=0.8), torch.optim.Adagrad(params[2:])
    assert default_momentum([adamw, muon]) == {"momentum": 0.8}
    assert default_momentum([adamw]) == {"momentum": 0.9}
    assert default_momentum([adagrad]) == {}


def test_rates_follow_until_they_are_set() -> None:
    groups: list[dict[str, Any]] = [
        {"name": "a", "lr": 0.1, "follows": "c"},
        {"name": "b", "lr": 0.1, "follows": "c"},
        {"name": "c", "lr": 0.1},
        {"name": "d", "lr": 0.1, "follows": "gone"},
    ]
    rates = FollowedRates()
    rates.remember(groups)
    groups[2]["lr"] = 0.2
    groups[1]["lr"] = 0.5
    rates.carry()
    assert [group["lr"] for group in groups] == [0.2, 0.5, 0.2, 0.1]


def test_a_refused_call_leaves_what_was_seen() -> None:
    """What a hybrid knows of its groups is put back with them."""
    param = nn.Parameter(torch.randn(3))
    hybrid = HybridOptimizer({"other": AdamW([param], lr=0.1)})
    group = hybrid.param_groups[0]

    def refused() -> None:
        with unchanged_on_error(hybrid):
            group["momentum"] = 0.5
            hybrid._momentum.remember(hybrid.param_groups)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        refused()
    assert group["momentum"] == 0.9
    group["momentum"] = 0.5
    hybrid.step()
    assert group["betas"] == (0.5, 0.999)
