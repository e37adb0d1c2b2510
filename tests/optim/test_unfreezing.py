"""HybridOptimizer: parameters that are unfrozen after construction are trained as their role asks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, lr_scheduler

from lightning_muon.optim import HybridOptimizer, MuonHyperball, NorMuon
from lightning_muon.partition import ParameterRule, partition_parameters
from lightning_muon.schedules import Constant, Cosine
from tests.optim.nets import TOKENS, Net, assert_linked_in_any_order, build, exact_muon, names_of, train
from tests.optim.subjects import assert_same_bits, reload


def of(package: str, name: str) -> Callable[..., Optimizer]:
    """An optimizer of a package that may be missing."""

    def make(groups: Any) -> Optimizer:
        return getattr(pytest.importorskip(package), name)(groups, lr=0.01)

    return make


CHILDREN: dict[str, Callable[..., Optimizer]] = {
    "AdamW": partial(AdamW, lr=0.01),
    "Muon": exact_muon,
    "NorMuon": partial(NorMuon, lr=0.01, orthogonalize_dtype="float32"),
    "schedulefree": of("schedulefree", "AdamWScheduleFree"),  # counts steps in its groups
    "pytorch_optimizer": of("pytorch_optimizer", "AdaBelief"),
}
PARTS = ("body", "attention", "norm")  # matrices, fused ones, vectors


def hybrid(net: nn.Module, role: str, child: str, **options: Any) -> HybridOptimizer:
    """The hybrid with ``child`` for one role."""
    factories: dict[str, Any] = {"matrix": exact_muon, "other": partial(AdamW, lr=0.003)}
    optimizer = HybridOptimizer.from_module(net, **{**factories, role: CHILDREN[child], **options})
    optimizer.train()
    return optimizer


def freeze(net: nn.Module, parts: Iterable[str] = PARTS, frozen: bool = True) -> None:
    for part in parts:
        getattr(net, part).requires_grad_(not frozen)


def frozen_net(seed: int = 0) -> Net:
    net = Net(seed)
    freeze(net)
    return net


def values(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def moved(net: nn.Module, before: list[Tensor]) -> set[str]:
    pairs = zip(net.named_parameters(), before, strict=True)
    return {name.split(".")[0] for (name, parameter), old in pairs if not torch.equal(parameter, old)}


over_roles = pytest.mark.parametrize("role", ["matrix", "other"])
over_cases = pytest.mark.parametrize(
    ("role", "child"),
    [("matrix", child) for child in CHILDREN] + [("other", child) for child in CHILDREN if "Muon" not in child],
)


@over_cases
@pytest.mark.parametrize("zeroed_by", ["optimizer", "module", "nobody"])
def test_unfrozen_parameters_are_trained(child: str, role: str, zeroed_by: str) -> None:
    net = frozen_net()
    optimizer = hybrid(net, role, child)
    train(net, optimizer, 2)
    freeze(net, frozen=False)
    before = values(net)
    if zeroed_by == "optimizer":
        optimizer.zero_grad()
        assert set(names_of(optimizer)) == {name for name, _ in net.named_parameters()}  # before clipping, unscaling
    elif zeroed_by == "module":
        net.zero_grad()
    loss = nn.functional.cross_entropy(net(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    assert moved(net, before) == {"embed", "body", "attention", "conv", "norm"}
    assert_linked_in_any_order(optimizer)
    full = names_of(build(Net()))
    for name, group in names_of(optimizer).items():
        assert group.removesuffix("/2") == full[name], name


@over_cases
def test_they_train_as_under_an_optimizer_made_for_them(child: str, role: str) -> None:
    """With counters of their own: the bias correction of a later step would make the first update far too large."""
    net = frozen_net()
    optimizer = hybrid(net, role, child)
    train(net, optimizer, 3)
    freeze(net, frozen=False)
    twin = copy.deepcopy(net)
    late = {name for name, _ in net.named_parameters() if name.split(".")[0] in PARTS}
    rest = [parameter for name, parameter in twin.named_parameters() if name not in late]
    for parameter in rest:
        parameter.requires_grad_(False)
    alone = hybrid(twin, role, child)
    for _ in range(3):
        gradients = {name: torch.randn(parameter.shape) for name, parameter in net.named_parameters()}
        optimizer.zero_grad()
        for module in (net, twin):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.grad = gradients[name].clone()
        optimizer.step()
        alone.step()
    for name, parameter in net.named_parameters():
        if name in late:
            torch.testing.assert_close(dict(twin.named_parameters())[name], parameter, rtol=0, atol=1e-6, msg=name)


@over_cases
@pytest.mark.parametrize("fresh", ["frozen", "trainable"])
def test_resuming_equals_not_having_stopped(child: str, role: str, fresh: str) -> None:
    """Whether the module that resumes starts with the layers frozen, as it did, or not."""

    def start(seed: int, frozen: bool = True) -> tuple[Net, HybridOptimizer, Any]:
        net = frozen_net(seed) if frozen else Net(seed)
        optimizer = hybrid(net, role, child)
        return net, optimizer, Cosine(warmup=2).scheduler(optimizer, 12)

    def run(net: Net, optimizer: HybridOptimizer, scheduler: Any, steps: Iterable[int]) -> None:
        for step in steps:
            if step in (2, 4):  # one after the other, as in gradual unfreezing
                freeze(net, PARTS[:1] if step == 2 else PARTS, frozen=False)
            optimizer.train()
            train(net, optimizer, 1)
            scheduler.step()

    net, optimizer, scheduler = start(0)
    run(net, optimizer, scheduler, range(6))
    optimizer.eval()
    saved = reload((net.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    twin, other, schedule = start(1, frozen=fresh == "frozen")
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    assert names_of(other) == names_of(optimizer)
    for one in (net, twin):
        freeze(one, frozen=False)
    run(net, optimizer, scheduler, range(6, 10))
    run(twin, other, schedule, range(6, 10))
    assert_same_bits(values(net), values(twin))
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in other.param_groups]


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=12),
    "ours": lambda optimizer: Constant(warmup=6).scheduler(optimizer, 12),
}


@pytest.mark.parametrize("parts", [PARTS, [*PARTS, "conv"]], ids=["some", "all matrices"])
@pytest.mark.parametrize(
    ("role", "child", "scheduler"),
    [(*case, name) for case in (("other", "AdamW"), ("matrix", "Muon"), ("matrix", "AdamW")) for name in SCHEDULERS]
    # It needs another group, which the others refuse with an error.
    + [("matrix", "schedulefree", name) for name in ("OneCycleLR", "ours")],
)
@pytest.mark.filterwarnings("ignore:.*has no trainable hidden matrix")
def test_schedulers_go_on(role: str, child: str, parts: list[str], scheduler: str) -> None:
    """Those of torch count the groups at their construction, and refuse others."""
    net = Net()
    freeze(net, parts)
    optimizer = hybrid(net, role, child)
    schedule = SCHEDULERS[scheduler](optimizer)
    for step in range(10):
        if step == 3:
            freeze(net, parts, frozen=False)
        train(net, optimizer, 1)
        schedule.step()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({name: rates[name.removesuffix("/2")] for name in rates})
    assert set(names_of(optimizer)) == {name for name, _ in net.named_parameters()}


@over_cases
@pytest.mark.filterwarnings("ignore:.*has no trainable hidden matrix")
def test_a_child_whose_parameters_are_all_frozen_waits(child: str, role: str) -> None:
    net = Net()
    entries = [entry for entry in partition_parameters(net) if entry.group == role]
    for entry in entries:
        entry.parameter.requires_grad_(False)
    optimizer = hybrid(net, role, child)
    assert not optimizer.optimizers[role].param_groups
    assert any(group["name"].startswith(role) and not group["params"] for group in optimizer.param_groups)
    before = values(net)
    train(net, optimizer, 2)
    optimizer.load_state_dict(reload(optimizer.state_dict()))
    optimizer.train()
    for entry in entries:
        entry.parameter.requires_grad_(True)
    train(net, optimizer, 1)
    assert len(moved(net, before)) == 5
    assert names_of(optimizer) == names_of(build(Net()))


def test_the_matrix_optimizer_of_a_frozen_backbone_is_named() -> None:
    net = Net()
    freeze(net, ["body", "attention", "conv"])
    with pytest.warns(UserWarning, match=r"5 hidden matrices are frozen, and go to Muon once they are unfrozen"):
        build(net)


@over_roles
@pytest.mark.filterwarnings("ignore:.*has no trainable hidden matrix")
def test_what_the_factory_gives_a_group_holds_for_a_frozen_one(role: str) -> None:
    """Not the defaults of its class."""
    net = Net()
    for entry in partition_parameters(net):
        entry.parameter.requires_grad_(
            entry.role == ("head" if role == "matrix" else "hidden") or entry.name == "embed.weight"
        )

    def factory(groups: Any) -> Optimizer:
        return AdamW([{**group, "lr": 0.25, "weight_decay": 0.5} for group in groups])

    optimizer = HybridOptimizer.from_module(net, **{role: factory})
    owned = [group for group in optimizer.param_groups if group["name"].startswith(role)]
    assert any(not group["params"] for group in owned)
    assert {(group["lr"], group["weight_decay"]) for group in owned} == {(0.25, 0.5)}


def test_options_and_groups_of_rules_hold() -> None:
    rules = [ParameterRule(pattern="body.*.weight", options={"lr": 0.5, "momentum": 0.25})]
    net = frozen_net()
    optimizer = build(net, rules=rules)
    freeze(net, frozen=False)
    optimizer.zero_grad()
    assert names_of(optimizer) == names_of(build(Net(), rules=rules))
    group = next(group for group in optimizer.param_groups if "body.0.weight" in group["param_names"])
    assert (group["lr"], group["momentum"]) == (0.5, 0.25)


def test_order_within_a_group_does_not_depend_on_history() -> None:
    net = frozen_net()
    optimizer = build(net)
    for part in reversed(PARTS):
        freeze(net, [part], frozen=False)
        train(net, optimizer, 1)
    late = {group["name"]: group["param_names"] for group in optimizer.param_groups}
    assert late == {group["name"]: group["param_names"] for group in build(Net()).param_groups}


def test_a_frozen_backbone_costs_no_construction_of_state() -> None:
    """Adagrad makes its state at construction; what is unfrozen later gets it then."""
    net = frozen_net()
    optimizer = build(
        net, other=partial(Adagrad, lr=0.01, initial_accumulator_value=0.5), matrix=partial(Adagrad, lr=0.01)
    )
    assert len(optimizer.state) == len(names_of(optimizer))
    before = values(net)
    freeze(net, frozen=False)
    train(net, optimizer, 2)
    assert len(moved(net, before)) == 5
    assert all((optimizer.state[net.norm.weight]["sum"] >= 0.5).tolist())


def test_parameters_that_cannot_train_are_no_concern() -> None:
    net = Net()
    net.body[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    net.body[0].weight.requires_grad_(False)
    net.conv.requires_grad_(False)
    with torch.no_grad():
        optimizer = build(net)
        optimizer.zero_grad()
    net.conv.requires_grad_(True)
    optimizer.zero_grad()
    assert "conv.weight" in names_of(optimizer)
    assert "body.0.weight" not in names_of(optimizer)


def test_what_a_child_refuses_is_named_and_changes_nothing() -> None:
    net = frozen_net()
    nn.init.zeros_(net.body[0].weight)
    optimizer = build(net, matrix=partial(MuonHyperball, lr=0.01))
    train(net, optimizer, 1)
    freeze(net, frozen=False)
    before = reload(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=r"'body.0.weight' is zero"):
        optimizer.zero_grad()
    assert optimizer.state_dict()["param_groups"] == before
    assert_linked_in_any_order(optimizer)


@pytest.mark.filterwarnings("ignore:.*has no trainable hidden matrix")
def test_a_child_that_refuses_frozen_parameters_is_made_without_them() -> None:
    net = Net()
    freeze(net, ["body", "attention", "conv"])
    nn.init.zeros_(net.body[0].weight)
    optimizer = build(net, matrix=partial(MuonHyperball, lr=0.03))
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}["matrix"] == 0.03
    with pytest.raises(ValueError, match=r"lr"):
        build(net, matrix=partial(MuonHyperball, lr=-1.0))


def test_trainable_parameters_that_were_left_out_stay_out() -> None:
    """Somebody made the children by hand, without them."""
    net = Net()
    partition = partition_parameters(net)
    chosen = [entry for entry in partition if entry.group == "other" and entry.name != "norm.weight"]
    net.norm.bias.requires_grad_(False)
    children = {"other": SGD([(e.name, e.parameter) for e in chosen if e.name != "norm.bias"], lr=0.1)}
    optimizer = HybridOptimizer(children, partition)
    net.norm.bias.requires_grad_(True)
    before = values(net)
    train(net, optimizer, 1)
    assert set(names_of(optimizer)) == {entry.name for entry in chosen}
    assert torch.equal(net.norm.weight, before[[name for name, _ in net.named_parameters()].index("norm.weight")])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_wait_too(how: str) -> None:
    net = frozen_net()
    optimizer = build(net)
    train(net, optimizer, 1)
    pair = (net, optimizer)
    net, optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = values(net)
    freeze(net, frozen=False)
    train(net, optimizer, 1)
    assert len(moved(net, before)) == 5


def test_behind_lightnings_wrapper() -> None:
    """Manual optimization calls zero_grad of a wrapper that keeps to itself the attributes it sets."""
    from lightning.pytorch.core.optimizer import LightningOptimizer

    net = frozen_net()
    optimizer = build(net)
    train(net, optimizer, 2)
    wrapped = LightningOptimizer(optimizer)
    for part in PARTS:
        freeze(net, [part], frozen=False)
        before = values(net)
        wrapped.zero_grad()
        assert any(name.startswith(part) for name in names_of(optimizer))
        nn.functional.cross_entropy(net(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
        assert part in moved(net, before)
        assert_linked_in_any_order(optimizer)


def test_unscaled_and_clipped_with_the_others() -> None:
    net, twin = frozen_net(), frozen_net()
    scaled, plain = build(net), build(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for module in (net, twin):
        freeze(module, frozen=False)
    for module, optimizer in ((net, scaled), (twin, plain)):
        optimizer.zero_grad()
        logits = module(TOKENS[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        (scaler.scale(loss) if module is net else loss).backward()
    scaler.unscale_(scaled)
    for optimizer in (scaled, plain):
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
    scaler.step(scaled)
    plain.step()
    for one, two in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_a_checkpoint_from_before_lets_them_go() -> None:
    """What is frozen here and was not trained there waits again."""
    net = frozen_net()
    optimizer = build(net)
    train(net, optimizer, 1)
    saved = reload(optimizer.state_dict())
    names = names_of(optimizer)
    freeze(net, frozen=False)
    train(net, optimizer, 1)
    freeze(net)
    optimizer.load_state_dict(saved)
    assert names_of(optimizer) == names
    assert_linked_in_any_order(optimizer)
    freeze(net, frozen=False)
    optimizer.zero_grad()
    assert names_of(optimizer) == names_of(build(Net()))


@pytest.mark.filterwarnings("ignore:.*has no trainable hidden matrix")
def test_distributed_checkpoints_of_frozen_layers() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net = Net()
    freeze(net, ["body", "attention", "conv"])
    optimizer = build(net)
    train(net, optimizer, 2)
    saved = reload(get_optimizer_state_dict(net, optimizer))
    twin = Net(seed=1)
    freeze(twin, ["body", "attention", "conv"])
    twin.load_state_dict(net.state_dict())
    other = build(twin)
    set_optimizer_state_dict(twin, other, saved)
    for one in (net, twin):
        freeze(one, frozen=False)
    assert train(net, optimizer, 2) == train(twin, other, 2)
    assert_same_bits(values(net), values(twin))
