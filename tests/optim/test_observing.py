"""observe_updates: who is told what, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_muon.optim import HybridOptimizer, Muon, MuonHyperball, StackUpdate
from lightning_muon.optim.matrix import MatrixOptimizer
from lightning_muon.partition import MatrixLayout
from tests.optim.observed import by_name
from tests.optim.subjects import HYBRID, MUON, Bag, advance, assert_same_bits, close, set_grads


def test_observers_see_the_update() -> None:
    """What observe_updates hands over is what the step subtracts, over the learning rate."""
    conv, fused, plain = (
        nn.Parameter(torch.randn(6, 2, 3, 3)),
        nn.Parameter(torch.randn(12, 5)),
        nn.Parameter(torch.randn(9, 4)),
    )
    layouts = [MatrixLayout(), MatrixLayout(split=(6, 4, 2)), MatrixLayout()]
    named = [("conv", conv), ("fused", fused), ("plain", plain)]
    optimizer = Muon([{"params": named, "layouts": layouts}], lr=0.1, weight_decay=0.0, orthogonalize_dtype="float32")
    seen: dict[str, Tensor] = {}
    handle = optimizer.observe_updates(by_name(seen.__setitem__))
    before = {name: param.detach().clone() for name, param in named}
    for _, param in named:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    assert set(seen) == {"conv", "fused", "plain"}
    for name, param in named:
        assert seen[name].shape == param.shape
        close(before[name] - param.detach(), 0.1 * seen[name])
    kept = {name: update.clone() for name, update in seen.items()}
    plain.grad = None
    handle.remove()
    optimizer.step()
    for name, update in kept.items():
        assert torch.equal(seen[name], update)


def test_observers_see_only_what_moves() -> None:
    bag, optimizer = HYBRID.pair()
    seen: list[str] = []
    handle = optimizer.observe_updates(lambda update: seen.extend(member.name for member in update.members))
    set_grads(bag, 0)
    bag.w1.grad = None
    optimizer.step()
    assert sorted(seen) == ["w0", "w2", "w3"]
    handle.remove()
    optimizer.step()
    assert len(seen) == 3


def test_observing_changes_no_result() -> None:
    bag, optimizer = MUON.pair(weight_decay=0.3)
    twin, other = MUON.pair(weight_decay=0.3)
    seen: list[Tensor] = []
    optimizer.observe_updates(lambda update: seen.append(update.direction.clone().zero_()))
    advance(bag, optimizer, range(3))
    advance(twin, other, range(3))
    assert_same_bits(bag.values(), twin.values())
    assert seen


def test_stacks_are_told_as_the_step_has_them() -> None:
    """Equal shapes in one stack, blocks of a fused tensor where their shape is, and places that fill the stack."""
    first, second, fused = (nn.Parameter(torch.randn(shape)) for shape in ((4, 5), (4, 5), (12, 5)))
    layouts = [MatrixLayout(), MatrixLayout(), MatrixLayout(split=(4, 6, 2))]
    named = [("first", first), ("second", second), ("fused", fused)]
    optimizer = Muon([{"params": named, "layouts": layouts}], lr_scale="spectral")
    seen: list[StackUpdate] = []
    optimizer.observe_updates(seen.append)
    for _, param in named:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    told = {
        tuple(update.direction.shape): [(member.name, member.view, member.slice) for member in update.members]
        for update in seen
    }
    assert told == {
        (3, 4, 5): [("first", 0, slice(0, 1)), ("second", 0, slice(1, 2)), ("fused", 0, slice(2, 3))],
        (1, 6, 5): [("fused", 1, slice(0, 1))],
        (1, 2, 5): [("fused", 2, slice(0, 1))],
    }
    for update in seen:
        m, n = update.direction.shape[1:]
        assert update.scale == pytest.approx((m / n) ** 0.5)


def test_places_are_those_among_the_matrices_that_move() -> None:
    params = [nn.Parameter(torch.randn(4, 5)) for _ in range(3)]
    optimizer = Muon([{"params": [(str(index), param) for index, param in enumerate(params)]}])
    seen: list[StackUpdate] = []
    optimizer.observe_updates(seen.append)
    for param in params[1:]:
        param.grad = torch.randn(4, 5)
    optimizer.step()
    (update,) = seen
    assert update.direction.shape == (2, 4, 5)
    assert [(member.parameter, member.slice) for member in update.members] == [
        (params[1], slice(0, 1)),
        (params[2], slice(1, 2)),
    ]


@pytest.mark.parametrize("rule", [Muon, MuonHyperball])
def test_weights_have_not_moved_yet(rule: type[MatrixOptimizer]) -> None:
    """So that an observer can compare an update with the weights that it is for."""
    bag = Bag()
    optimizer = rule(bag.named("w"), lr=0.1)
    before = {param: param.detach().clone() for param in bag.parameters()}
    moved: list[bool] = []
    optimizer.observe_updates(
        lambda update: moved.extend(not torch.equal(m.parameter, before[m.parameter]) for m in update.members)
    )
    set_grads(bag, 0)
    optimizer.step()
    assert moved == [False] * 4


def test_bfloat16_parameters_show_what_is_subtracted_of_them() -> None:
    param = nn.Parameter(torch.randn(6, 4).bfloat16())
    optimizer = Muon([param], lr=1.0, weight_decay=0.0, lr_scale="none", orthogonalize_dtype="float32")
    seen: list[Tensor] = []
    optimizer.observe_updates(lambda update: seen.append(update.direction.clone()))
    before = param.detach().clone()
    param.grad = torch.randn(6, 4).bfloat16()
    optimizer.step()
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(before - seen[0][0], param.detach())


def test_a_learning_rate_of_zero_shows_an_update_of_zero_where_the_rule_has_it_in_its_step() -> None:
    param = nn.Parameter(torch.randn(6, 4))
    optimizer = MuonHyperball([param], lr=0.0)
    seen: dict[str, Tensor] = {}
    optimizer.observe_updates(by_name(seen.__setitem__))
    param.grad = torch.randn(6, 4)
    optimizer.step()
    assert [float(update.abs().max()) for update in seen.values()] == [0.0]


def test_a_hybrid_tells_of_its_matrix_optimizers_only() -> None:
    bag = Bag()
    first, *rest = bag.named("w")
    hybrid = HybridOptimizer({"other": SGD([first], lr=0.1), "matrix": Muon(rest)})
    seen: list[str] = []
    handle = hybrid.observe_updates(lambda update: seen.extend(member.name for member in update.members))
    set_grads(bag, 0)
    hybrid.step()
    assert sorted(seen) == ["w1", "w2", "w3"]
    handle.remove()
    hybrid.step()
    assert len(seen) == 3


def test_an_observer_of_a_hybrid_without_matrix_optimizers_hears_nothing() -> None:
    bag = Bag()
    hybrid = HybridOptimizer({"other": SGD(bag.named("w"), lr=0.1)})
    handle = hybrid.observe_updates(lambda update: pytest.fail("SGD has no stacks"))
    set_grads(bag, 0)
    hybrid.step()
    handle.remove()
