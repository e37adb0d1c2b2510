"""HybridOptimizer: many optimizers behind one torch.optim.Optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, AdamW, Optimizer, RMSprop, SparseAdam, lr_scheduler

from lightning_muon.optim import Conda, HybridOptimizer, Muon
from lightning_muon.partition import ParameterRule
from tests.optim.nets import (
    Net,
    adamw,
    assert_linked,
    build,
    exact_muon,
    train,
)
from tests.optim.subjects import (
    EPS,
    HYBRID,
    Bag,
    advance,
    assert_same_bits,
    reload,
    set_grads,
    snapshot,
)


def reach(optimizer: HybridOptimizer, how: str) -> HybridOptimizer:
    if how == "built":
        return optimizer
    if how == "deepcopy":
        return copy.deepcopy(optimizer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(optimizer))
    optimizer.load_state_dict(reload(optimizer.state_dict()))
    return optimizer


@pytest.mark.parametrize("how", ["built", "deepcopy", "pickle", "load"])
@pytest.mark.parametrize("steps", [0, 2])
def test_groups_and_state_are_the_childrens(how: str, steps: int) -> None:
    net = Net()
    optimizer = build(net)
    train(net, optimizer, steps)
    optimizer = reach(optimizer, how)
    assert_linked(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    for child in optimizer.optimizers.values():
        assert all(group["lr"] == 0.125 for group in child.param_groups)


def test_groups_are_named_uniquely_other_first() -> None:
    optimizer = build(Net(), rules=[ParameterRule(pattern="body.*.weight", options={"lr": 0.5})])
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)
    kinds = [name.split("/")[0] for name in names]
    assert kinds == sorted(kinds, key=["other", "matrix"].index)
    assert set(kinds) == {"other", "matrix"}
    assert list(optimizer.optimizers) == ["other", "matrix"]


def test_groups_of_children_without_names_get_unique_ones() -> None:
    bag = HYBRID.bag()
    named = dict(bag.named_parameters())
    other = AdamW([{"params": [named["v0"]]}, {"params": [named["v1"]], "lr": 0.5}])
    matrix = Muon([{"params": [named["w0"]]}, {"params": [named["w1"]]}, {"params": [named["w2"], named["w3"]]}])
    optimizer = HybridOptimizer({"other": other, "matrix": matrix})
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == 5
    assert [name.split("/")[0] for name in names] == ["other"] * 2 + ["matrix"] * 3


def test_groups_of_one_name_are_refused() -> None:
    bag = HYBRID.bag()
    other = AdamW([{"params": [bag.v0], "name": "same"}])
    matrix = Muon([{"params": [bag.w0], "name": "same"}])
    with pytest.raises(ValueError, match="same"):
        HybridOptimizer({"other": other, "matrix": matrix})


def test_betas_stay_out_of_the_defaults() -> None:
    """OneCycleLR and LearningRateMonitor would else look for betas in every group."""
    optimizer = build(Net())
    assert "betas" not in optimizer.defaults
    assert "momentum" in optimizer.defaults


@pytest.mark.parametrize("matrix", [partial(AdamW, lr=0.01), partial(Conda, lr=0.01)], ids=["AdamW", "Conda"])
def test_momentum_cycles_where_all_children_have_betas(matrix: Callable[[Any], Optimizer]) -> None:
    """An AdamW baseline with a rate of its own for the matrices goes through OneCycleLR like any other hybrid."""
    optimizer = build(Net(), matrix=matrix)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.8, max_momentum=0.9)
    for _ in range(2):  # the momentum is lowest in step 2
        optimizer.step()
        scheduler.step()
    optimizer.step()
    assert {round(group["betas"][0], 3) for group in optimizer.param_groups} == {0.8}
    assert {group["betas"][1] for group in optimizer.param_groups} <= {0.999, 0.99}


CHILDREN: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": adamw,
    "AdamW fused": partial(AdamW, lr=0.01, fused=True),
    "AdamW foreach amsgrad": partial(AdamW, lr=0.01, foreach=True, amsgrad=True),
    "SGD": partial(SGD, lr=0.01),
    "SGD momentum": partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
    "RMSprop": partial(RMSprop, lr=0.01, momentum=0.5),
    "Adagrad": partial(Adagrad, lr=0.01),  # has state from construction on
}


@pytest.mark.parametrize("name", CHILDREN)
def test_any_optimizer_may_be_the_other_child(name: str) -> None:
    bag, twin = HYBRID.bag(), HYBRID.bag()

    def children(of: Bag) -> dict[str, Optimizer]:
        return {"other": CHILDREN[name](of.named("v")), "matrix": exact_muon(of.named("w"))}

    optimizer = HybridOptimizer(children(bag))
    alone = children(twin)
    for seed in range(4):
        set_grads(bag, seed)
        set_grads(twin, seed)
        optimizer.step()
        for child in alone.values():
            child.step()
    assert_same_bits(bag.values(), twin.values())
    resumed = HYBRID.bag(seed=4)
    resumed.load_state_dict(bag.state_dict())
    again = HybridOptimizer(children(resumed))
    again.load_state_dict(reload(optimizer.state_dict()))
    for pair in ((bag, optimizer), (resumed, again)):
        advance(*pair, range(5, 8))
    assert_same_bits(snapshot(bag, optimizer), snapshot(resumed, again))


@pytest.mark.parametrize("matrix", [torch.optim.Muon, AdamW, SGD], ids=lambda kind: kind.__name__)
def test_any_optimizer_may_be_the_matrix_child(matrix: type[Optimizer]) -> None:
    """torch.optim.Muon, and the fair control: AdamW with a learning rate of its own on the matrices."""
    bag, twin = HYBRID.bag(), HYBRID.bag()
    optimizer = HybridOptimizer({"other": adamw(bag.named("v")), "matrix": matrix(bag.named("w"), lr=0.05)})
    alone = [adamw(twin.named("v")), matrix(twin.named("w"), lr=0.05)]
    for seed in range(4):
        set_grads(bag, seed)
        set_grads(twin, seed)
        optimizer.step()
        for child in alone:
            child.step()
    assert_same_bits(bag.values(), twin.values())


def test_more_than_two_children() -> None:
    bag = HYBRID.bag()
    *vectors, table = bag.named("v")
    optimizer = HybridOptimizer(
        {
            "tables": SGD([table], lr=0.1),
            "other": adamw(vectors),
            "matrix": exact_muon(bag.named("w")),
        }
    )
    before = bag.values()
    advance(bag, optimizer, range(2))
    assert [group["name"] for group in optimizer.param_groups] == ["tables", "other", "matrix"]
    assert all(not torch.equal(old, new) for old, new in zip(before, bag.values(), strict=True))
    assert_linked(optimizer)


def test_sparse_embedding_with_sparse_adam() -> None:
    table, linear = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4, bias=False)
    optimizer = HybridOptimizer(
        {"other": SparseAdam(table.parameters(), lr=0.1), "matrix": exact_muon(linear.parameters())}
    )
    before = table.weight.detach().clone()
    linear(table(torch.tensor([1, 3]))).square().sum().backward()
    optimizer.step()
    moved = (table.weight != before).any(dim=1)
    assert moved.tolist() == [row in (1, 3) for row in range(9)]


@pytest.mark.parametrize("child", [None, "adamw", nn.Linear(2, 2), AdamW])
def test_child_that_is_no_optimizer_is_refused(child: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"matrix|optimizer"):
        HybridOptimizer({"matrix": child})


def test_lbfgs_is_refused() -> None:
    """It evaluates the closure several times a step."""
    with pytest.raises((TypeError, ValueError), match="LBFGS"):
        HybridOptimizer({"other": LBFGS([nn.Parameter(torch.randn(3))])})


def test_zero_gradients_and_zero_rate_change_no_parameter() -> None:
    """What distributed checkpointing does to make state."""
    net = Net()
    optimizer = build(
        net, other=partial(AdamW, lr=0.1, weight_decay=0.5), matrix=partial(Muon, lr=0.1, weight_decay=0.5)
    )
    train(net, optimizer, 2)
    before = [param.detach().clone() for param in net.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_bits(before, [param.detach() for param in net.parameters()])


def test_closure_runs_once_and_before_any_child_moves() -> None:
    bag, optimizer = HYBRID.pair()
    seen = []

    def closure() -> float:
        seen.append(bag.values())
        set_grads(bag, 3)
        return 1.5

    before = bag.values()
    assert optimizer.step(closure) == 1.5
    assert len(seen) == 1
    assert_same_bits(before, seen[0])
    assert all(not torch.equal(old, new) for old, new in zip(before, bag.values(), strict=True))


def test_scheduler_moves_both_rates_from_their_own_start() -> None:
    """Fault 19."""
    net = Net()
    optimizer = build(net)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    for step in range(1, 5):
        train(net, optimizer, 1)
        scheduler.step()
        for group in optimizer.param_groups:
            start = 0.02 if group["name"].startswith("matrix") else 0.003
            assert group["lr"] == pytest.approx(start * (1 - step / 4))
    before = [param.detach().clone() for param in net.parameters()]
    train(net, optimizer, 1)
    assert_same_bits(before, [param.detach() for param in net.parameters()])


def test_scheduler_goes_on_after_a_load() -> None:
    """The scheduler holds the hybrid, not the groups it had when it was built."""
    net = Net()
    optimizer = build(net)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    train(net, optimizer, 1)
    scheduler.step()
    optimizer.load_state_dict(reload(optimizer.state_dict()))
    scheduler.step()
    for child, start in (("other", 0.003), ("matrix", 0.02)):
        assert all(group["lr"] == pytest.approx(start / 2) for group in optimizer.optimizers[child].param_groups)


def test_grad_scaler_with_a_fused_child() -> None:
    bag, optimizer = HYBRID.bag(), None
    optimizer = HybridOptimizer(
        {"other": AdamW(bag.named("v"), lr=0.02, eps=EPS, fused=True), "matrix": exact_muon(bag.named("w"))}
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    advance(bag, optimizer, range(1))
    before = snapshot(bag, optimizer)
    optimizer.zero_grad()
    scaler.scale(bag(torch.ones(()))).backward()
    bag.v0.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(before, snapshot(bag, optimizer))
    optimizer.zero_grad()
    scaler.scale(bag(torch.ones(()))).backward()
    scaler.step(optimizer)
    assert all(not torch.equal(old, new) for old, new in zip(before, bag.values(), strict=False))
