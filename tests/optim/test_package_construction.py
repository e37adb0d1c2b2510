"""Optimizer classes handed to packages that call ``optimizer(params=module.parameters(), lr=...)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lightning_muon.optim import HybridOptimizer
from tests.optim.nets import Net
from tests.optim.rule_cases import RULES

CALLS: dict[str, Callable[[type[Any], nn.Module], Any]] = {
    "neuralforecast": lambda optimizer, module: optimizer(params=module.parameters(), lr=1e-3),
    "darts": lambda optimizer, module: optimizer(module.parameters(), lr=1e-3),
    "no options": lambda optimizer, module: optimizer(list(module.parameters())),
    "named": lambda optimizer, module: optimizer(module.named_parameters(), lr=1e-3, weight_decay=0.0),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["HybridOptimizer", *sorted(RULES)])
def test_the_error_names_the_cause_and_the_way(name: str, call: str) -> None:
    optimizer = HybridOptimizer if name == "HybridOptimizer" else RULES[name]
    with pytest.raises((TypeError, ValueError)) as error:
        CALLS[call](optimizer, Net())
    assert "lightning_muon.UseMuon" in str(error.value)
    assert "callbacks=[" in str(error.value)
