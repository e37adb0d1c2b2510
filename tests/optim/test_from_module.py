"""HybridOptimizer.from_module: which parameter goes where, with which options."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lightning_muon.optim import HybridOptimizer, Muon
from lightning_muon.partition import ParameterRule, partition_parameters
from tests.optim.nets import (
    Net,
    build,
    names_of,
    train,
)


def test_every_parameter_once_where_the_partition_says() -> None:
    """Fault 31."""
    net = Net()
    optimizer = build(net)
    placed = names_of(optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert len({id(param) for param in params}) == len(params) == len(list(net.parameters()))
    assert {name for name, group in placed.items() if group.startswith("matrix")} == {
        "body.0.weight",
        "body.2.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "conv.weight",
    }
    assert placed["embed.weight"].startswith("other")
    assert "head.weight" not in placed


def test_names_stand_beside_their_parameters() -> None:
    net = Net()
    named = dict(net.named_parameters())
    for group in build(net).param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert named[name] is param


def test_it_trains() -> None:
    net = Net()
    losses = train(net, build(net), 60)
    assert losses[-1] < 0.2 * losses[0]


def test_children_keep_their_own_defaults() -> None:
    """None means the optimizer's own defaults, whichever optimizer it is."""
    optimizer = HybridOptimizer.from_module(Net(), other=SGD)
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert optimizer.param_groups[-1]["weight_decay"] == 0.1
    optimizer = HybridOptimizer.from_module(Net())
    assert isinstance(optimizer.optimizers["other"], AdamW)
    assert isinstance(optimizer.optimizers["matrix"], Muon)
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_from_module_with_adamw_on_the_matrices() -> None:
    net, twin = Net(), Net()
    optimizer = build(net, matrix=partial(AdamW, lr=0.02))
    assert "layouts" not in optimizer.param_groups[-1]
    named = dict(twin.named_parameters())
    placed = names_of(optimizer)
    matrices = [param for name, param in named.items() if placed[name].startswith("matrix")]
    others = [param for name, param in named.items() if not placed[name].startswith("matrix")]
    plain = AdamW([{"params": others, "lr": 0.003}, {"params": matrices, "lr": 0.02}])
    train(net, optimizer, 3)
    train(twin, plain, 3)
    for name, param in net.named_parameters():
        torch.testing.assert_close(param, named[name])


def test_module_without_matrices_warns_and_trains() -> None:
    net = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="matri"):
        optimizer = build(net)
    before = [param.detach().clone() for param in net.parameters()]
    net(torch.randn(8, 4)).pow(3).sum().backward()
    optimizer.step()
    assert list(optimizer.optimizers) == ["other"]
    assert any(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_module_of_matrices_only_does_not_warn() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
            self.head = nn.Linear(4, 2, bias=False)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = build(Deep(), rules=[ParameterRule(pattern="*", group="matrix")])
    assert list(optimizer.optimizers) == ["matrix"]


def test_module_without_trainable_parameters_is_refused() -> None:
    net = Net()
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        build(net)


def test_rules_and_partition_exclude_each_other() -> None:
    net = Net()
    rules = [ParameterRule(pattern="conv.weight", group="other")]
    partition = partition_parameters(net, rules)
    assert names_of(build(net, partition=partition))["conv.weight"].startswith("other")
    with pytest.raises(ValueError, match="partition"):
        build(net, partition=partition, rules=rules)


def test_rule_sets_options_of_a_group() -> None:
    """Fault 20."""
    rules = [
        ParameterRule(role="embedding", options={"lr": 0.5, "weight_decay": 0.0}),
        ParameterRule(pattern="conv.weight", options={"momentum": 0.5}),
    ]
    optimizer = build(Net(), rules=rules)
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert (groups["embed.weight"]["lr"], groups["embed.weight"]["weight_decay"]) == (0.5, 0.0)
    assert groups["norm.weight"]["lr"] == 0.003
    assert groups["conv.weight"]["momentum"] == 0.5
    assert groups["body.0.weight"]["momentum"] == 0.95


@pytest.mark.parametrize(
    ("pattern", "options", "named"),
    [
        ("conv.weight", {"betas": (0.9, 0.95)}, "betas"),
        ("norm.weight", {"nesterov": True}, "nesterov"),
        ("*", {"lrr": 1.0}, "lrr"),
    ],
)
def test_option_that_the_optimizer_lacks_is_refused(pattern: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(Net(), rules=[ParameterRule(pattern=pattern, options=options)])


@pytest.mark.parametrize("pattern", ["conv.weight", "norm.weight"])
@pytest.mark.parametrize("options", [{"lr": -0.5}, {"lr": float("nan")}, {"weight_decay": -0.5}])
def test_option_out_of_range_is_refused(pattern: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        build(Net(), rules=[ParameterRule(pattern=pattern, options=options)])


@pytest.mark.parametrize(
    ("part", "factory", "start"),
    [
        ("matrix", partial(Muon, lr=-1), r"matrix_optimizer \(Muon\): lr must"),
        ("matrix", partial(AdamW, lr=-1.0), r"matrix_optimizer \(AdamW\): Invalid learning rate"),
        ("other", partial(SGD, lr=-1.0), r"other_optimizer \(SGD\): Invalid learning rate"),
        ("other", lambda groups: AdamW(groups, lr=-1.0), "other_optimizer: Invalid learning rate"),
    ],
)
def test_the_error_of_an_optimizer_says_which_one_refuses(part: str, factory: Any, start: str) -> None:
    with pytest.raises(ValueError, match=f"^{start}"):
        HybridOptimizer.from_module(Net(), **{part: factory})


@pytest.mark.parametrize("rank", [0, 1])
def test_each_warning_is_given_by_the_first_process_only(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    norms = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4))
    partition = partition_parameters(norms)
    monkeypatch.setattr(type(partition), "warnings", lambda self: ["a warning of the partition"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        HybridOptimizer.from_module(norms, partition=partition)
    assert len(caught) == (2 if rank == 0 else 0)
    assert all(warning.filename == __file__ for warning in caught)


def test_factory_that_makes_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="Optimizer"):
        build(Net(), matrix=lambda groups: groups)


def test_compiled_module_has_the_same_names() -> None:
    """Checkpoints of a compiled and of a plain module fit each other."""
    net = Net()
    plain = names_of(build(net))
    compiled = torch.compile(net, backend="eager")
    assert names_of(build(compiled)) == plain
