"""The warning about a nearly empty group matrix in a model that may have many matrices."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_muon import HybridOptimizer
from lightning_muon.partition import ParameterRule, partition_parameters
from tests.partition.modules import Parts, mlp


class Unknown(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(rows, columns))


def unknown(count: int = 3, width: int = 64) -> nn.Module:
    layers = nn.ModuleList([*(Unknown(width, width) for _ in range(count)), Unknown(8, 8)])
    return Parts(layers=layers, mix=nn.Linear(16, 16), out=nn.Linear(16, 4))


def test_the_largest_are_named_with_their_reason_and_the_rule_that_sends_them():
    [text] = partition_parameters(unknown()).warnings()
    assert text.startswith("Only 256 of 12,608 elements that may be hidden matrices go to the matrix optimizer.")
    assert f"'layers.*.map' (4 x 64 x 64): Not known to be a matrix: 'map' of {__name__}.Unknown." in text
    rule = ParameterRule(pattern="layers.*.map", group="matrix")
    assert "{pattern: 'layers.*.map', group: matrix}" in text
    assert partition_parameters(unknown(), [rule]).warnings() == []


def test_the_optimizer_warns():
    with pytest.warns(UserWarning, match="Only 256 of 12,608 elements"):
        HybridOptimizer.from_module(unknown())


QUIET = {
    "hidden matrices prevail": mlp(64, 64, 64, 4),
    "a few unknown ones beside them": Parts(body=mlp(64, 64, 64, 4), probe=Unknown(8, 64)),
    "mostly embeddings": Parts(items=nn.Embedding(5000, 64), body=mlp(16, 16, 4)),
    "mostly a head": Parts(body=mlp(16, 16), out=nn.Linear(16, 5000)),
    "linear model": nn.Sequential(nn.Linear(64, 4)),
    "only vectors": nn.LayerNorm(64),
    "depthwise filters": Parts(body=mlp(8, 8), conv=nn.Conv2d(512, 512, 3, groups=512)),
}


@pytest.mark.parametrize("module", QUIET.values(), ids=QUIET)
def test_no_warning_where_the_evidence_says_why(module):
    assert partition_parameters(module).warnings() == []


def test_no_warning_about_what_is_frozen_or_sent_by_a_rule():
    module = unknown()
    assert partition_parameters(module, [ParameterRule(pattern="layers.*", group="other")]).warnings() == []
    module.layers.requires_grad_(False)
    assert partition_parameters(module).warnings() == []


def test_parametrizations_count_as_unknown():
    module = nn.Sequential(*(parametrizations.orthogonal(nn.Linear(16, 16)) for _ in range(3)), nn.Linear(16, 4))
    [text] = partition_parameters(module).warnings()
    assert "_Orthogonal computes the weight of Linear" in text


def test_the_hybrid_is_silent_about_ordinary_models():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HybridOptimizer.from_module(mlp(16, 16, 4))
