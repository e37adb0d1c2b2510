"""The torch.optim contract, part 7: schedulers, hooks, compilation, and changes made from outside."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer, lr_scheduler

from lightning_muon.optim import HybridOptimizer, OrthogonalizingOptimizer
from tests.optim.subjects import (
    HYBRID,
    MUON,
    Bag,
    Subject,
    advance,
    assert_go_on_alike,
    assert_same_bits,
    fresh,
    over_all,
    over_ours,
    reload,
    set_grads,
    snapshot,
    trained,
)


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@over_all
def test_lambda_lr_scales_each_group_from_its_own_rate(subject: Subject) -> None:
    """Fault 19."""
    bag, optimizer = subject.pair()
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.02 / (1 + 9 * index)
    first = rates(optimizer)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 4))
    for step in range(1, 6):
        advance(bag, optimizer, range(step, step + 1))
        scheduler.step()
        assert rates(optimizer) == pytest.approx([rate * max(0.0, 1 - step / 4) for rate in first])
    before = bag.values()
    advance(bag, optimizer, range(9, 10))
    assert_same_bits(before, bag.values())


SCHEDULERS = {
    "OneCycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False),
    "Cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
    "WarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3),
    "Linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=5),
    "Exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "Cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "Sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 8)],
        milestones=[2],
    ),
}


@over_all
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(subject: Subject, name: str) -> None:
    bag, optimizer = subject.pair()
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for step in range(6):
        advance(bag, optimizer, range(step, step + 1))
        scheduler.step()
        seen.append(rates(optimizer))
    assert len({tuple(entry) for entry in seen}) > 1
    assert all(len(set(entry)) == 1 for entry in seen)  # the groups began with one rate
    assert all(param.isfinite().all() for param in bag.parameters())


@over_all
@pytest.mark.parametrize("name", ["OneCycle", "Cyclic"])
def test_scheduler_that_cycles_momentum(subject: Subject, name: str) -> None:
    """Fault 21: it works on the matrices' momentum, and leaves AdamW's betas in a usable state."""
    bag, optimizer = subject.pair()
    if name == "OneCycle":
        scheduler: Any = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    else:
        scheduler = lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4)
    momenta, first_betas = [], []
    for step in range(8):
        advance(bag, optimizer, range(step, step + 1))
        first_betas.extend(group["betas"][0] for group in optimizer.param_groups if "betas" in group)
        scheduler.step()
        momenta.append(optimizer.param_groups[-1].get("momentum", optimizer.param_groups[-1].get("betas")))
        for group in optimizer.param_groups:
            assert 0 <= group.get("momentum", 0.9) < 1
            assert len(group.get("betas", (0.9, 0.999))) == 2
    assert len(set(momenta)) > 1
    if first_betas:
        assert len(set(first_betas)) > 1  # AdamW in the hybrid follows what the scheduler wrote
    assert all(param.isfinite().all() for param in bag.parameters())


@over_all
def test_reduce_on_plateau(subject: Subject) -> None:
    _, optimizer = subject.pair()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0, 1.0):
        scheduler.step(loss)
    assert all(rate == pytest.approx(0.005) for rate in rates(optimizer))


@over_all
def test_scheduler_resumes(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for step in range(4):
        advance(bag, optimizer, range(step, step + 1))
        scheduler.step()
    twin, other = fresh(subject, bag)
    resumed = lr_scheduler.CosineAnnealingLR(other, T_max=10)
    other.load_state_dict(reload(optimizer.state_dict()))
    resumed.load_state_dict(reload(scheduler.state_dict()))
    for step in range(4, 8):
        for pair, each in (((bag, optimizer), scheduler), ((twin, other), resumed)):
            advance(*pair, range(step, step + 1))
            each.step()
    assert rates(optimizer) == rates(other)
    assert_same_bits(bag.values(), twin.values())


@over_all
def test_step_hooks(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    calls: list[str] = []
    pre = optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre"))
    post = optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("post"))
    advance(bag, optimizer, range(1))
    assert calls == ["pre", "post"]
    pre.remove()
    advance(bag, optimizer, range(1))
    assert calls == ["pre", "post", "post"]
    post.remove()
    twin, other = copy.deepcopy((bag, optimizer))
    advance(twin, other, range(1))
    assert len(calls) == 3


@over_all
def test_pre_hook_may_change_gradients(subject: Subject) -> None:
    bag, optimizer = subject.pair(weight_decay=0.0)
    before = bag.values()

    def silence(opt: Optimizer, args: Any, kwargs: Any) -> None:
        for param in bag.parameters():
            param.grad = None

    optimizer.register_step_pre_hook(silence)
    advance(bag, optimizer, range(1))
    assert_same_bits(before, bag.values())


@over_all
def test_step_can_be_wrapped_by_a_scheduler_and_called(subject: Subject) -> None:
    """LR schedulers patch ``step`` to see that it was called before theirs."""
    bag, optimizer = subject.pair()
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(bag, optimizer, range(1))
        scheduler.step()


@over_all
def test_tensor_learning_rate_equals_a_number(subject: Subject) -> None:
    bag, optimizer = subject.pair(lr=torch.tensor(0.02))
    twin, other = subject.pair(lr=0.02)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"].fill_(0.02 * (step + 1))
        for group in other.param_groups:
            group["lr"] = 0.02 * (step + 1)
        advance(bag, optimizer, range(step, step + 1))
        advance(twin, other, range(step, step + 1))
    for one, wanted in zip(bag.values(), twin.values(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["number", "tensor"])
@over_ours
def test_compiled_step(subject: Subject, rate: str) -> None:
    """Faults 22 and 23: the right result, and a change of the learning rate makes no new graph."""
    torch._dynamo.reset()
    lr: Any = torch.tensor(0.02) if rate == "tensor" else 0.02
    bag, optimizer = subject.pair(lr=lr)
    twin, other = subject.pair()
    step = torch.compile(optimizer.step, backend="eager")
    graphs = []
    for index in range(6):
        for group, plain in zip(optimizer.param_groups, other.param_groups, strict=True):
            plain["lr"] = 0.02 * (index + 1)
            if rate == "tensor":
                group["lr"].fill_(plain["lr"])
            else:
                group["lr"] = plain["lr"]
        set_grads(bag, index)
        step()
        advance(twin, other, range(index, index + 1))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    for one, wanted in zip(bag.values(), twin.values(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-5)
    if rate == "tensor" or subject is MUON:  # AdamW inside a hybrid recompiles on a float, as alone
        assert graphs[2:] == graphs[2:3] * 4
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_steps_of_many_models_and_dtypes() -> None:
    """Fault 23: the second model in a process meets no recompile limit."""
    torch._dynamo.reset()
    for seed in range(10):
        dtype = (torch.float32, torch.bfloat16, torch.float64)[seed % 3]
        bag = Bag(matrices=[(2 + seed, 4), (5, 3 + seed)], dtype=dtype)
        optimizer = MUON.build(bag)
        before = bag.values()
        set_grads(bag, seed)
        torch.compile(optimizer.step, backend="eager")()
        assert all(not torch.equal(old, new) for old, new in zip(before, bag.values(), strict=True))
    torch._dynamo.reset()


@pytest.mark.slow
def test_step_inside_a_compiled_training_step() -> None:
    torch._dynamo.reset()
    bag, optimizer = MUON.pair()
    twin, other = MUON.pair()

    @torch.compile(backend="eager")
    def train(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((param * x).square().sum() for param in bag.parameters())
        loss.backward()
        optimizer.step()
        return loss

    for x in (1.0, 2.0, 3.0):
        train(torch.tensor(x))
        other.zero_grad()
        sum((param * x).square().sum() for param in twin.parameters()).backward()
        other.step()
    for one, wanted in zip(bag.values(), twin.values(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-4)
    torch._dynamo.reset()


@over_all
def test_same_seed_same_bits(subject: Subject) -> None:
    first, second = trained(subject, steps=5), trained(subject, steps=5)
    assert_same_bits(snapshot(*first), snapshot(*second))


@over_ours
def test_takes_no_random_numbers(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    before = torch.get_rng_state()
    set_grads(bag, 0)
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


@over_all
def test_weights_moved_under_the_optimizer(subject: Subject) -> None:
    """EMA, weight averaging and load_state_dict write other values into the same parameters."""
    bag, optimizer = trained(subject)
    twin, other = trained(subject)
    for pair in (bag, twin):
        with torch.no_grad():
            for param in pair.parameters():
                param.mul_(0.5)
    for param in twin.parameters():
        param.data = param.data.clone()  # as swapping by an averaging callback does
    assert_go_on_alike((bag, optimizer), (twin, other))


def test_model_converted_after_construction() -> None:
    """module.to(bfloat16) gives the same parameters another dtype."""
    bag, optimizer = trained(MUON)
    bag.to(torch.bfloat16)
    set_grads(bag, 5)
    optimizer.step()
    for param in bag.parameters():
        assert param.dtype == torch.bfloat16
        assert param.isfinite().all()
        assert optimizer.state[param]["momentum_buffer"].dtype == torch.float32


def test_clearing_the_state_starts_anew() -> None:
    """Some callbacks reset an optimizer by ``optimizer.state.clear()`` or a new defaultdict."""
    from collections import defaultdict

    for reset in ("clear", "assign"):
        bag, optimizer = trained(MUON)
        if reset == "clear":
            optimizer.state.clear()
        else:
            optimizer.state = defaultdict(dict)
        set_grads(bag, 5)
        optimizer.step()
        for param in bag.parameters():
            torch.testing.assert_close(
                optimizer.state[param]["momentum_buffer"], param.grad * 0.05, rtol=1e-5, atol=1e-7
            )


def test_state_written_by_hand_is_used() -> None:
    """``state[p]["momentum_buffer"]`` is the momentum, in place or replaced."""
    for how in ("in place", "replaced"):
        bag, optimizer = trained(MUON)
        for param in bag.parameters():
            if how == "in place":
                optimizer.state[param]["momentum_buffer"].zero_()
            else:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        set_grads(bag, 5)
        optimizer.step()
        for param in bag.parameters():
            torch.testing.assert_close(
                optimizer.state[param]["momentum_buffer"], param.grad * 0.05, rtol=1e-5, atol=1e-7
            )


def test_subclass_with_its_own_rule() -> None:
    """A rule is two methods; the base does the rest."""
    from lightning_muon.optim import MatrixOptimizer

    class SignDescent(MatrixOptimizer):
        def __init__(self, params: Any, lr: float = 1e-3, **shared: Any) -> None:
            super().__init__(params, {"lr": lr, "weight_decay": 0.0}, **shared)

        def init_state(self, stack: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
            return {"steps": stack.new_zeros(stack.shape[0]), "second": torch.zeros_like(stack)}

        def direction(self, grad: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> torch.Tensor:
            state["steps"] += 1
            state["second"].add_(grad.square())
            return grad.sign()

    bag = Bag()
    optimizer = SignDescent(bag.named("w"), lr=0.1, lr_scale="none")
    before = bag.values()
    set_grads(bag, 0)
    optimizer.step()
    for param, old in zip(bag.parameters(), before, strict=True):
        torch.testing.assert_close(param.detach(), old - 0.1 * param.grad.sign())
        assert optimizer.state[param]["steps"].tolist() == [1.0]
        torch.testing.assert_close(optimizer.state[param]["second"], param.grad.square())
    twin = Bag(seed=3)
    twin.load_state_dict(bag.state_dict())
    other = SignDescent(twin.named("w"), lr=0.1, lr_scale="none")
    other.load_state_dict(reload(optimizer.state_dict()))
    bag.w1.requires_grad_(False)
    twin.w1.requires_grad_(False)
    for seed in range(1, 3):
        for pair in (bag, twin):
            set_grads(pair, seed)
            pair.w1.grad = None
        optimizer.step()
        other.step()
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))
    assert optimizer.state[bag.w0]["steps"].tolist() == [3.0]
    assert optimizer.state[bag.w1]["steps"].tolist() == [1.0]


def test_hybrid_serializes_without_the_module() -> None:
    """A pickled hybrid carries its children and links them again."""
    _, optimizer = trained(HYBRID)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert isinstance(other, HybridOptimizer)
    assert list(other.optimizers) == ["other", "matrix"]
    assert isinstance(other.optimizers["other"], AdamW)
    for child in other.optimizers.values():
        assert all(any(group is own for own in other.param_groups) for group in child.param_groups)


def _rule(direction: Any = None, state: Any = None) -> type[Any]:
    """A rule as in the README, with mistakes."""

    class Mistaken(OrthogonalizingOptimizer):
        def __init__(self, params: Any, lr: float = 1e-3, **shared: Any) -> None:
            super().__init__(params, {"lr": lr}, **shared)

        def init_state(self, weights: torch.Tensor, options: dict[str, Any]) -> Any:
            return {} if state is None else state(weights)

        def direction(self, grad: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> Any:
            return self.orthogonalize(grad, group) if direction is None else direction(grad)

    return Mistaken


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"direction": lambda grad: grad[:, :, :1]}, r"Mistaken.direction must return .*'w0'; it returned shape"),
        ({"direction": lambda grad: grad.mT}, "it returned shape"),
        ({"direction": lambda grad: grad[0]}, "it returned shape"),
        ({"direction": lambda grad: None if grad is None else 3}, "it returned int"),
        ({"state": lambda weights: weights}, "init_state must return a dict of tensors, got Tensor"),
        ({"state": lambda weights: {"steps": 0}}, "'steps' is int"),
        ({"state": lambda weights: {"rows": weights[0, 0]}}, r"'rows' has shape \("),
    ],
)
def test_subclass_with_a_mistake_gets_a_sentence(mistake: dict[str, Any], message: str) -> None:
    bag = Bag()
    optimizer = _rule(**mistake)(bag.named("w"))
    before = bag.values()
    set_grads(bag, 0)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, before, bag.values()))
