"""HybridOptimizer: checkpoints by name, groups added and assigned later, state reset."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from lightning_muon.optim import HybridOptimizer
from lightning_muon.partition import ParameterRule
from tests.optim.nets import (
    TOKENS,
    Net,
    adamw,
    assert_linked_in_any_order,
    build,
    exact_muon,
    names_of,
    train,
)
from tests.optim.subjects import (
    HYBRID,
    advance,
    assert_same_bits,
    reload,
    snapshot,
)


def test_saved_with_weights_only(tmp_path: Path) -> None:
    net = Net()
    rules = [ParameterRule(role="embedding", options={"lr": 0.5, "weight_decay": 0.0})]
    optimizer = build(net, rules=rules)
    train(net, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    twin = Net(seed=1)
    twin.load_state_dict(net.state_dict())
    other = build(twin, rules=rules)
    other.load_state_dict(loaded)
    assert train(net, optimizer, 3) == train(twin, other, 3)
    assert_same_bits([p.detach() for p in net.parameters()], [p.detach() for p in twin.parameters()])


def test_state_of_every_entry_is_restored() -> None:
    """Fault 18: no child loses its state."""
    net = Net()
    optimizer = build(net)
    train(net, optimizer, 2)
    other = build(Net(seed=1))
    other.load_state_dict(reload(optimizer.state_dict()))
    for first, second in zip(optimizer.param_groups, other.param_groups, strict=True):
        for one, two in zip(first["params"], second["params"], strict=True):
            assert optimizer.state[one].keys() == other.state[two].keys() != set()
            for key, value in optimizer.state[one].items():
                assert torch.equal(value, other.state[two][key])


@pytest.mark.parametrize("what", ["groups", "parameters", "both"])
def test_permuted_state_is_matched_by_name(what: str) -> None:
    """Another version of the package may list groups or parameters in another order."""
    net = Net()
    optimizer = build(net)
    train(net, optimizer, 3)
    saved = reload(optimizer.state_dict())
    if what != "groups":
        for group in saved["param_groups"]:
            group["params"].reverse()
            group["param_names"].reverse()
    if what != "parameters":
        saved["param_groups"].reverse()
    kept = reload(saved)
    twin = Net(seed=1)
    twin.load_state_dict(net.state_dict())
    other = build(twin)
    other.load_state_dict(saved)
    assert [group["name"] for group in other.param_groups] == [group["name"] for group in optimizer.param_groups]
    assert names_of(other) == names_of(optimizer)
    assert saved["param_groups"] == kept["param_groups"]
    assert train(net, optimizer, 3) == train(twin, other, 3)
    assert_same_bits([p.detach() for p in net.parameters()], [p.detach() for p in twin.parameters()])


def test_state_of_another_partition_is_refused_by_name() -> None:
    net = Net()
    saved = reload(build(net, rules=[ParameterRule(pattern="conv.weight", group="other")]).state_dict())
    optimizer = build(net)
    before = reload(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"conv\.weight"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_state_of_another_model_is_refused_by_name() -> None:
    class Larger(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(8, 8)

    small, large = build(Net()), build(Larger())
    with pytest.raises(ValueError, match=r"extra\.weight"):
        small.load_state_dict(reload(large.state_dict()))
    with pytest.raises(ValueError, match=r"extra\.weight"):
        large.load_state_dict(reload(small.state_dict()))


def test_state_that_lacks_trainable_parameters_is_refused_by_name() -> None:
    """It was saved with them frozen; the other way round they join, see test_unfreezing.py."""
    net = Net()
    net.body.requires_grad_(False)
    saved = reload(build(net).state_dict())
    with pytest.raises(ValueError, match=r"not in the checkpoint: .*body\.0\.weight"):
        build(Net()).load_state_dict(saved)


def test_renamed_parameters_of_the_same_order_are_refused() -> None:
    """By position they would fit; by name they are other parameters."""
    net = Net()
    saved = reload(build(net).state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [name.replace("body", "trunk") for name in group["param_names"]]
    with pytest.raises(ValueError, match=r"trunk\.0"):
        build(net).load_state_dict(saved)


def test_add_param_group_routes_what_was_frozen() -> None:
    """BackboneFinetuning adds one unnamed group of everything it unfreezes."""
    net = Net()
    net.body.requires_grad_(False)
    net.attention.requires_grad_(False)
    optimizer = build(net)
    assert not any(name.startswith(("body", "attention")) for name in names_of(optimizer))
    train(net, optimizer, 2)
    net.body.requires_grad_(True)
    net.attention.requires_grad_(True)
    unfrozen = [*net.body.parameters(), *net.attention.parameters()]
    optimizer.add_param_group({"params": unfrozen, "lr": 0.0125})
    assert_linked_in_any_order(optimizer)
    placed = names_of(optimizer)
    full = names_of(build(Net()))
    assert set(placed) == set(full)
    for name, group in placed.items():
        assert group.split("/")[0] == full[name].split("/")[0], name
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)
    for group in optimizer.param_groups:
        if any(name.startswith(("body", "attention")) for name in group["param_names"]):
            assert group["lr"] == 0.0125
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    train(net, optimizer, 2)
    for name, param in net.named_parameters():
        assert not torch.equal(param, before[name]), name


def test_unfrozen_matrices_keep_their_layout() -> None:
    """A fused projection that is unfrozen later is split as it would have been from the start."""
    first, second = Net(), Net()
    first.attention.requires_grad_(False)
    early, late = build(second), build(first)
    first.attention.requires_grad_(True)
    late.add_param_group({"params": list(first.attention.parameters())})
    for _ in range(2):
        grads = {name: torch.randn(param.shape) for name, param in first.named_parameters()}
        for net in (first, second):
            for name, param in net.named_parameters():
                param.grad = grads[name].clone()
        early.step()
        late.step()
    for name, param in first.named_parameters():
        torch.testing.assert_close(param.detach(), dict(second.named_parameters())[name].detach(), rtol=0, atol=1e-6)


def test_unfrozen_groups_resume() -> None:
    def unfrozen(seed: int) -> tuple[Net, HybridOptimizer]:
        net = Net(seed)
        net.body.requires_grad_(False)
        optimizer = build(net)
        net.body.requires_grad_(True)
        optimizer.add_param_group({"params": list(net.body.parameters()), "lr": 0.01})
        return net, optimizer

    net, optimizer = unfrozen(0)
    train(net, optimizer, 3)
    twin, other = unfrozen(1)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(reload(optimizer.state_dict()))
    assert train(net, optimizer, 3) == train(twin, other, 3)
    copied, again = copy.deepcopy((net, optimizer))
    assert train(net, optimizer, 2) == train(copied, again, 2)


def test_assigned_groups_are_adopted() -> None:
    """Lightning's BaseFinetuning assigns new group dicts on resume, before the state is loaded."""
    net = Net()
    net.body.requires_grad_(False)
    optimizer = build(net)
    train(net, optimizer, 1)
    net.body.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.body.parameters()), "lr": 0.01})
    train(net, optimizer, 2)
    saved = reload(optimizer.state_dict())

    twin = Net(seed=1)
    twin.load_state_dict(net.state_dict())
    twin.body.requires_grad_(False)
    other = build(twin)
    twin.body.requires_grad_(True)
    named = dict(twin.named_parameters())
    mine = {id(param): name for name, param in net.named_parameters()}
    other.param_groups = [
        {**group, "params": [named[mine[id(param)]] for param in group["params"]]} for group in optimizer.param_groups
    ]
    other.load_state_dict(saved)
    assert_linked_in_any_order(other)
    assert train(net, optimizer, 3) == train(twin, other, 3)
    for group in other.param_groups:
        group["lr"] = 0.0
    before = [param.detach().clone() for param in twin.parameters()]
    train(twin, other, 1)
    assert_same_bits(before, [param.detach() for param in twin.parameters()])


@pytest.mark.parametrize("named", [True, False])
def test_add_param_group_by_name(named: bool) -> None:
    """Without a partition the group's name says which child takes it."""
    bag = HYBRID.bag()
    pairs = dict(bag.named_parameters())
    known = {k: p for k, p in pairs.items() if k not in ("v2", "w3")}
    if named:
        children: dict[str, Optimizer] = {
            "other": adamw([(k, p) for k, p in known.items() if k[0] == "v"]),
            "matrix": exact_muon([(k, p) for k, p in known.items() if k[0] == "w"]),
        }
        extra: list[Any] = [("v2", pairs["v2"])]
        matrix: list[Any] = [("w3", pairs["w3"])]
    else:
        children = {
            "other": adamw([p for k, p in known.items() if k[0] == "v"]),
            "matrix": exact_muon([p for k, p in known.items() if k[0] == "w"]),
        }
        extra, matrix = [pairs["v2"]], [pairs["w3"]]
    optimizer = HybridOptimizer(children)
    optimizer.add_param_group({"params": extra, "name": "other/late", "lr": 0.25})
    optimizer.add_param_group({"params": matrix, "name": "matrix/late"})
    assert_linked_in_any_order(optimizer)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "other": 0.01,
        "matrix": 0.02,
        "other/late": 0.25,
        "matrix/late": 0.02,
    }
    before = bag.values()
    advance(bag, optimizer, range(2))
    assert all(not torch.equal(old, new) for old, new in zip(before, bag.values(), strict=True))


def test_add_param_group_of_unknown_belonging_is_refused() -> None:
    optimizer = build(Net())
    count = len(optimizer.param_groups)
    for group in (
        {"params": [nn.Parameter(torch.randn(4, 4))]},
        {"params": [nn.Parameter(torch.randn(4, 4))], "name": "new"},
    ):
        with pytest.raises(ValueError, match=r"(?i)name"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == count


def test_add_param_group_of_a_parameter_that_has_an_optimizer_is_refused() -> None:
    """Even where the other child has it."""
    net = Net()
    optimizer = build(net)
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"more than one|already|several|one optimizer"):
        optimizer.add_param_group({"params": [net.body[0].weight]})
    with pytest.raises(ValueError, match=r"more than one|already|several|one optimizer"):
        optimizer.add_param_group({"params": [("again", net.body[0].weight)], "name": "other/again"})
    assert len(optimizer.param_groups) == count
    assert sum(len(child.param_groups) for child in optimizer.optimizers.values()) == count


def test_refused_group_leaves_everything_as_it_was() -> None:
    """A vector cannot go to the matrix child; the error comes before any change, and training goes on."""
    bag, optimizer = HYBRID.pair()
    twin, other = HYBRID.pair()
    with pytest.raises(ValueError, match="new"):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.randn(4)))], "name": "matrix/new"})
    assert_linked_in_any_order(optimizer)
    advance(bag, optimizer, range(2))
    advance(twin, other, range(2))
    assert_same_bits(bag.values(), twin.values())
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def test_scheduler_sees_added_groups() -> None:
    net = Net()
    net.body.requires_grad_(False)
    optimizer = build(net)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    net.body.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.body.parameters()), "lr": 0.01})
    train(net, optimizer, 1)
    scheduler.step()
    late = [group for group in optimizer.param_groups if any(name.startswith("body") for name in group["param_names"])]
    assert late
    assert all(group["lr"] == pytest.approx(0.005) for group in late)
    child_groups = [group for child in optimizer.optimizers.values() for group in child.param_groups]
    assert {id(group) for group in child_groups} == {id(group) for group in optimizer.param_groups}


def test_behind_lightnings_wrapper() -> None:
    """``self.optimizers()`` of a LightningModule copies our attributes; what is done to it reaches the optimizer."""
    from lightning.pytorch.core.optimizer import LightningOptimizer

    net = Net()
    net.body.requires_grad_(False)
    optimizer = build(net)
    wrapped = LightningOptimizer(optimizer)
    train(net, optimizer, 2)
    net.body.requires_grad_(True)
    wrapped.add_param_group({"params": list(net.body.parameters()), "lr": 0.01})
    wrapped.param_groups[0]["lr"] = 0.004
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    train(net, optimizer, 1)
    assert all(not torch.equal(param, before[name]) for name, param in net.named_parameters())
    assert_linked_in_any_order(optimizer)
    assert set(names_of(optimizer)) == set(names_of(build(Net())))
    assert optimizer.param_groups[0]["lr"] == 0.004


def test_under_fabric() -> None:
    from lightning.fabric import Fabric

    plain, net = Net(), Net()
    alone = build(plain)
    fabric = Fabric(accelerator="cpu", devices=1)
    module, optimizer = fabric.setup(net, build(net))
    train(plain, alone, 3)
    for _ in range(3):
        optimizer.zero_grad()
        logits = module(TOKENS[:, :-1])
        fabric.backward(nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()))
        optimizer.step()
    for one, other in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)
    saved = reload(optimizer.state_dict())
    alone.load_state_dict(saved)


def test_resetting_the_state() -> None:
    for reset in ("clear", "assign"):
        bag, optimizer = HYBRID.pair()
        advance(bag, optimizer, range(3))
        twin, other = HYBRID.pair()
        twin.load_state_dict(bag.state_dict())
        if reset == "clear":
            optimizer.state.clear()
        else:
            optimizer.state = defaultdict(dict)
        advance(bag, optimizer, range(5, 7))
        advance(twin, other, range(5, 7))
        assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


def test_state_of_a_wrong_shape_is_refused_on_loading() -> None:
    """Not in the middle of the next step, when the other half has moved."""
    bag, optimizer = HYBRID.pair()
    advance(bag, optimizer, range(1))
    saved = optimizer.state_dict()
    broken = {key: dict(values) for key, values in saved["state"].items()}
    index = next(key for key, values in broken.items() if "momentum_buffer" in values)
    broken[index]["momentum_buffer"] = torch.zeros(2, 2)
    _, fresh = HYBRID.pair()
    with pytest.raises(ValueError, match=r"momentum_buffer.*\(2, 2\)"):
        fresh.load_state_dict({**saved, "state": broken})
