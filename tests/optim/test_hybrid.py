"""HybridOptimizer: many optimizers behind one torch.optim.Optimizer."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_muon.optim import HybridOptimizer, Muon
from lightning_muon.partition import ParameterRule, partition_parameters
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
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, AdamW, Optimizer, RMSprop, SparseAdam, lr_scheduler

exact_muon = partial(Muon, lr=0.02, orthogonalize_dtype="float32")
plain_adamw = partial(AdamW, lr=0.003)


class Net(nn.Module):
    """Embedding tied to the head, attention with a fused projection, convolution, norm, linears."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.conv(x.mT).mT
        return self.head(self.norm(x + self.body(x)))


TOKENS = torch.arange(24).reshape(4, 6) * 7 % 11


def train(net: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = net(TOKENS[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(net: nn.Module, **options: Any) -> HybridOptimizer:
    return HybridOptimizer.from_module(net, **{"matrix": exact_muon, "other": plain_adamw, **options})


def names_of(optimizer: Optimizer) -> dict[str, str]:
    """Parameter name -> group name."""
    return {name: group["name"] for group in optimizer.param_groups for name in group["param_names"]}


def assert_linked(optimizer: HybridOptimizer) -> None:
    """The groups are the children's very dicts, in order, and all share one state."""
    own = [group for child in optimizer.optimizers.values() for group in child.param_groups]
    assert len(own) == len(optimizer.param_groups)
    assert all(first is second for first, second in zip(own, optimizer.param_groups, strict=True))
    assert all(child.state is optimizer.state for child in optimizer.optimizers.values())


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


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=0.01)


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
    optimizer = HybridOptimizer({"other": SparseAdam(table.parameters(), lr=0.1), "matrix": exact_muon(linear.parameters())})
    before = table.weight.detach().clone()
    linear(table(torch.tensor([1, 3]))).square().sum().backward()
    optimizer.step()
    moved = (table.weight != before).any(dim=1)
    assert moved.tolist() == [row in (1, 3) for row in range(9)]


@pytest.mark.parametrize("child", [None, "adamw", nn.Linear(2, 2), AdamW])
def test_child_that_is_no_optimizer_is_refused(child: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="matrix|optimizer"):
        HybridOptimizer({"matrix": child})


def test_lbfgs_is_refused() -> None:
    """It evaluates the closure several times a step."""
    with pytest.raises((TypeError, ValueError), match="LBFGS"):
        HybridOptimizer({"other": LBFGS([nn.Parameter(torch.randn(3))])})


def test_zero_gradients_and_zero_rate_change_no_parameter() -> None:
    """What distributed checkpointing does to make state."""
    net = Net()
    optimizer = build(net, other=partial(AdamW, lr=0.1, weight_decay=0.5), matrix=partial(Muon, lr=0.1, weight_decay=0.5))
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


def test_state_of_another_freezing_is_refused_by_name() -> None:
    net = Net()
    saved = reload(build(net).state_dict())
    net.body.requires_grad_(False)
    with pytest.raises(ValueError, match=r"body\.0\.weight"):
        build(net).load_state_dict(saved)


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


def assert_linked_in_any_order(optimizer: HybridOptimizer) -> None:
    own = {id(group) for child in optimizer.optimizers.values() for group in child.param_groups}
    assert own == {id(group) for group in optimizer.param_groups}
    assert len(own) == len(optimizer.param_groups)
    assert all(child.state is optimizer.state for child in optimizer.optimizers.values())


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
    for group in ({"params": [nn.Parameter(torch.randn(4, 4))]}, {"params": [nn.Parameter(torch.randn(4, 4))], "name": "new"}):
        with pytest.raises(ValueError, match="(?i)name"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == count


def test_add_param_group_of_a_parameter_that_has_an_optimizer_is_refused() -> None:
    """Even where the other child has it."""
    net = Net()
    optimizer = build(net)
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [net.body[0].weight]})
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [("again", net.body[0].weight)], "name": "other/again"})
    assert len(optimizer.param_groups) == count
    assert sum(len(child.param_groups) for child in optimizer.optimizers.values()) == count


def test_refused_group_leaves_everything_as_it_was() -> None:
    """A vector cannot go to the matrix child; the error comes before any change, and training goes on."""
    bag, optimizer = HYBRID.pair()
    twin, other = HYBRID.pair()
    with pytest.raises(ValueError):
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
    [("conv.weight", {"betas": (0.9, 0.95)}, "betas"), ("norm.weight", {"nesterov": True}, "nesterov"), ("*", {"lrr": 1.0}, "lrr")],
)
def test_option_that_the_optimizer_lacks_is_refused(pattern: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(Net(), rules=[ParameterRule(pattern=pattern, options=options)])


@pytest.mark.parametrize("pattern", ["conv.weight", "norm.weight"])
@pytest.mark.parametrize("options", [{"lr": -0.5}, {"lr": float("nan")}, {"weight_decay": -0.5}])
def test_option_out_of_range_is_refused(pattern: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        build(Net(), rules=[ParameterRule(pattern=pattern, options=options)])


def test_factory_that_makes_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="Optimizer"):
        build(Net(), matrix=lambda groups: groups)


def test_compiled_module_has_the_same_names() -> None:
    """Checkpoints of a compiled and of a plain module fit each other."""
    net = Net()
    plain = names_of(build(net))
    compiled = torch.compile(net, backend="eager")
    assert names_of(build(compiled)) == plain


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
