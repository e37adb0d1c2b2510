"""State in float16 where a rule keeps squares, which that format cannot hold: 1e-4 squared is 0 there."""

from __future__ import annotations

import pytest
import torch

from lightning_muon.optim import AdaMuon, Conda, MuonNSR, MuonVS
from lightning_muon.optim.arguments import dtype_for_squares
from tests.optim.rule_cases import normal
from tests.optim.rule_walk import relative, walk

SQUARES = {Conda: "exp_avg_sq", AdaMuon: "second_moment", MuonNSR: "variance", MuonVS: "variance"}
over_rules = pytest.mark.parametrize("rule", SQUARES, ids=lambda rule: rule.__name__)


def test_only_float16_is_widened() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [dtype_for_squares(dtype) for dtype in dtypes] == [torch.float32, *dtypes[1:]]


@over_rules
def test_goes_the_way_of_float32_state(rule: type) -> None:
    """What is left is the rounding of the momentum, 1 part in 2000 of each entry."""
    (weight,) = normal(8, 6, seed=1)
    grads = [grad * 1e-3 for grad in normal(8, 6, 10)]
    wanted = walk(rule, weight.float(), grads, lr=0.01, weight_decay=0.0)
    run = walk(rule, weight.float(), grads, lr=0.01, weight_decay=0.0, state_dtype="float16")
    assert relative(run.weights[-1] - weight, wanted.weights[-1] - weight) < 0.02
    assert run.states[-1][SQUARES[rule]].dtype == torch.float32
    small = {"momentum_buffer", "exp_avg"} & run.states[-1].keys()
    assert {run.states[-1][key].dtype for key in small} == {torch.float16}
