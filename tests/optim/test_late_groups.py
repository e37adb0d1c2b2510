"""Param groups that are added in mid-run: where they go, at which learning rate, and who sets it later."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from lightning_muon.optim import HybridOptimizer, Muon, NorMuon
from lightning_muon.partition import ParameterRule, partition_parameters
from lightning_muon.schedules import Constant, Cosine, Schedule, WarmupStableDecay
from tests.optim.nets import Net, assert_linked_in_any_order, build, names_of, train
from tests.optim.subjects import reload


def schedulefree(groups: Any) -> Optimizer:
    return pytest.importorskip("schedulefree").AdamWScheduleFree(groups, lr=2e-3)


MATRIX: dict[str, Callable[..., Optimizer]] = {
    "AdamW": partial(AdamW, lr=2e-3),
    "Muon": partial(Muon, lr=2e-3),
    "NorMuon": partial(NorMuon, lr=2e-3),
    "schedulefree": schedulefree,
    "by group": lambda groups: AdamW([{**group, "lr": 2e-3} for group in groups]),  # not the default of the class
}
SCHEDULES = [Constant(warmup=20), Cosine(warmup=4), WarmupStableDecay(warmup=0.1, decay=0.5), Cosine()]


def without_body(child: str = "Muon", **options: Any) -> tuple[Net, HybridOptimizer]:
    """A net whose body is frozen, and its optimizer."""
    net = Net()
    net.body.requires_grad_(False)
    optimizer = build(net, **{"matrix": MATRIX[child], "other": partial(AdamW, lr=4e-3), **options})
    optimizer.train()
    return net, optimizer


def rates(optimizer: Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("child", "schedule", "at"),
    [(child, Constant(warmup=20), 10) for child in MATRIX]
    + [("Muon", schedule, at) for schedule in SCHEDULES for at in (0, 1, 20)],
    ids=repr,
)
@pytest.mark.parametrize("given", [None, 5e-4])
def test_a_late_group_follows_the_schedule_to_its_rate(
    child: str, schedule: Schedule, at: int, given: float | None
) -> None:
    """The rate is that at the peak: the one given, or else the one that the child was built with."""
    net, optimizer = without_body(child)
    scheduler = schedule.scheduler(optimizer, 30)
    peaks = {"matrix": 2e-3, "other/vector": 4e-3} if given is None else {"matrix": given, "other/vector": given}
    for step in range(30):
        if step == at:
            net.body.requires_grad_(True)
            group = {"params": list(net.body.parameters())}
            optimizer.add_param_group(group if given is None else {**group, "lr": given})
        if step >= at:
            for name, peak in peaks.items():
                assert rates(optimizer)[f"{name}/2"] == pytest.approx(peak * schedule.at_step(step, 30)), step
        train(net, optimizer, 1)
        scheduler.step()


@pytest.mark.parametrize("given", [None, 5e-4])
def test_without_a_schedule_it_has_its_rate_at_once(given: float | None) -> None:
    net, optimizer = without_body()
    net.body.requires_grad_(True)
    group = {"params": list(net.body.parameters())}
    optimizer.add_param_group(group if given is None else {**group, "lr": given})
    late = rates(optimizer)
    assert (late["matrix/2"], late["other/vector/2"]) == ((2e-3, 4e-3) if given is None else (given, given))


@pytest.mark.parametrize("start", [0.0, 1e-12])
def test_a_schedule_at_zero_divides_nothing(start: float) -> None:
    net, optimizer = without_body()
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: start if step < 2 else 1.0)
    net.body.requires_grad_(True)
    optimizer.zero_grad()
    assert set(rates(optimizer).values()) <= {2e-3 * start, 4e-3 * start}
    for _ in range(3):
        train(net, optimizer, 1)
        scheduler.step()
    assert set(rates(optimizer).values()) == {2e-3, 4e-3}


def test_one_cycle_knows_the_late_group() -> None:
    """Its rates are in the group, and the peak is not the first of them."""
    net, optimizer = without_body()
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=[g["lr"] for g in optimizer.param_groups], total_steps=20)
    for step in range(19):
        if step == 3:
            net.body.requires_grad_(True)
            optimizer.add_param_group({"params": list(net.body.parameters()), "lr": 5e-4})
        if step >= 3:
            assert rates(optimizer)["matrix/2"] == pytest.approx(rates(optimizer)["matrix"] / 4)
        train(net, optimizer, 1)
        scheduler.step()


def test_options_that_are_not_given_are_those_of_the_group_it_belongs_to() -> None:
    rules = [ParameterRule(pattern="body.*.weight", options={"lr": 0.5, "momentum": 0.25})]
    net, optimizer = without_body(rules=rules)
    late = [group for group in optimizer.param_groups if not group["params"]]
    assert [(group["lr"], group["momentum"]) for group in late] == [(0.5, 0.25)]
    late[0]["nesterov"] = False
    net.body.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.body.parameters()), "weight_decay": 0.75})
    group = next(group for group in optimizer.param_groups if "body.0.weight" in group["param_names"])
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, 0.25, False, 0.75)


def test_a_group_of_no_known_kind_takes_the_rate_that_all_have_or_asks() -> None:
    def child(*lrs: float) -> HybridOptimizer:
        groups = [{"params": [nn.Parameter(torch.randn(3))], "lr": lr} for lr in lrs]
        return HybridOptimizer({"other": SGD(groups)})

    def add(optimizer: HybridOptimizer) -> float:
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3))], "name": "other/new"})
        return rates(optimizer)["other/new"]

    assert add(child(0.25, 0.25)) == 0.25
    assert add(child(0.25, 1e-3)) == 1e-3  # the default of SGD
    optimizer = child(0.25, 0.5)
    with pytest.raises(ValueError, match=r"'other/new' needs an 'lr'.*0\.25 in 'other/0', 0\.5 in 'other/1'"):
        add(optimizer)
    assert len(optimizer.param_groups) == 2


def test_a_refused_part_takes_the_other_parts_back() -> None:
    """The matrices would go to Muon, a stranger to nobody."""
    net, optimizer = without_body()
    before = reload(optimizer.state_dict())["param_groups"]
    net.body.requires_grad_(True)
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": list(net.body.parameters()), "lr": -1.0})
    assert reload(optimizer.state_dict())["param_groups"] == before
    assert_linked_in_any_order(optimizer)


def test_parts_of_one_call_follow_the_rate_of_the_last() -> None:
    """BackboneFinetuning adds one group, and then sets the rate of ``param_groups[-1]``."""
    net, optimizer = without_body()
    net.body.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.body.parameters()), "lr": 1e-4})
    train(net, optimizer, 1)
    for lr in (2e-4, 4e-4):
        optimizer.param_groups[-1]["lr"] = lr
        train(net, optimizer, 1)
        assert {rates(optimizer)["matrix/2"], rates(optimizer)["other/vector/2"]} == {lr}
    assert rates(optimizer)["matrix"] == 2e-3
    optimizer.load_state_dict(reload(optimizer.state_dict()))
    optimizer.param_groups[-1]["lr"] = 8e-4
    optimizer.zero_grad()
    assert rates(optimizer)["matrix/2"] == 8e-4
    named = {group["name"]: group for group in optimizer.param_groups}
    named["matrix/2"]["lr"] = 5e-3  # a rate of its own
    optimizer.zero_grad()
    assert (rates(optimizer)["matrix/2"], rates(optimizer)["other/vector/2"]) == (5e-3, 8e-4)


# Layers that are new


class Adapter(nn.Module):
    """A layer put around another, as PEFT does."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down, self.up = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("child", MATRIX)
def test_new_layers_join_by_a_new_partition(child: str) -> None:
    net = Net()
    optimizer = build(net, matrix=MATRIX[child])
    optimizer.train()
    train(net, optimizer, 2)
    kept = {key: value.clone() for key, value in optimizer.state[net.conv.weight].items() if torch.is_tensor(value)}
    net.body[0] = Adapter(net.body[0])
    net.body[2] = nn.Linear(8, 8)
    joined = optimizer.adopt(partition_parameters(net))
    assert {entry.name for entry in joined} == {
        "body.0.down.weight", "body.0.up.weight", "body.2.weight", "body.2.bias"
    }  # fmt: skip
    assert set(names_of(optimizer)) == {name for name, _ in net.named_parameters()}
    assert {entry.name for entry in optimizer.partition} == set(names_of(optimizer))
    assert_linked_in_any_order(optimizer)
    members = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert members == set(net.parameters()) >= set(optimizer.state)
    assert all(torch.equal(optimizer.state[net.conv.weight][key], value) for key, value in kept.items())
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    train(net, optimizer, 2)
    still = {name for name, parameter in net.named_parameters() if torch.equal(parameter, before[name])}
    assert still == {"body.0.base_layer.weight", "body.0.base_layer.bias"}
    net.body[0].base_layer.requires_grad_(True)
    train(net, optimizer, 1)
    assert not torch.equal(net.body[0].base_layer.weight, before["body.0.base_layer.weight"])
    optimizer.load_state_dict(reload(optimizer.state_dict()))


def test_new_layers_that_no_child_takes_are_named_and_change_nothing() -> None:
    net = nn.Sequential(nn.LayerNorm(8), nn.BatchNorm1d(8))
    with pytest.warns(UserWarning, match="no trainable hidden matrix"):
        optimizer = build(net)
    before = reload(optimizer.state_dict())["param_groups"]
    net.append(nn.Linear(8, 8))
    net.append(nn.ReLU())
    net.append(nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"No optimizer takes '2\.weight' \(matrix\): this one has 'other' only"):
        optimizer.adopt(partition_parameters(net))
    assert reload(optimizer.state_dict())["param_groups"] == before
    assert_linked_in_any_order(optimizer)


def test_observers_hear_of_parameters_that_join() -> None:
    net, optimizer = without_body()
    seen: list[str] = []
    handle = optimizer.observe_updates(lambda update: seen.extend(member.name for member in update.members))
    net.body.requires_grad_(True)
    train(net, optimizer, 1)
    assert "body.0.weight" in seen
    handle.remove()
    seen.clear()
    train(net, optimizer, 1)
    assert not seen
