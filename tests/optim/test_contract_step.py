"""The torch.optim contract, part 3: state, dtypes, order, freezing, and what a step must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.optim import Muon
from tests.optim.subjects import (
    MUON,
    Subject,
    advance,
    assert_same_bits,
    close,
    over_all,
    over_dtypes,
    over_ours,
    set_grads,
)


@pytest.mark.parametrize("nesterov", [True, False])
@over_dtypes
@pytest.mark.parametrize("state_dtype", ["float32", None])
def test_momentum_buffer_is_the_average_of_the_gradients(
    dtype: torch.dtype, nesterov: bool, state_dtype: str | None
) -> None:
    """Fault 7: the buffer is not normalized in place, and is no alias of the gradient."""
    params = [nn.Parameter(torch.randn(4, 6).to(dtype)), nn.Parameter(torch.randn(6, 4).to(dtype))]
    optimizer = Muon(params, lr=0.0, momentum=0.9, nesterov=nesterov, state_dtype=state_dtype)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param in params:
        buffer = optimizer.state[param]["momentum_buffer"]
        assert buffer.dtype == (torch.float64 if dtype == torch.float64 else torch.float32 if state_dtype else dtype)
        torch.testing.assert_close(
            buffer.double(), torch.full(param.shape, 0.1, dtype=torch.float64), rtol=4e-3, atol=0
        )
        param.grad.zero_()
        assert (buffer != 0).all()
    optimizer.step()
    for param in params:
        wanted = torch.full(param.shape, 0.09, dtype=torch.float64)
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"].double(), wanted, rtol=8e-3, atol=0)


@pytest.mark.parametrize("nesterov", [True, False])
def test_float32_state_of_bfloat16_parameters_keeps_its_bits(nesterov: bool) -> None:
    param = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    optimizer = Muon([param], lr=0.0, momentum=0.99, nesterov=nesterov)
    wanted = torch.zeros(4, 6, dtype=torch.float64)
    for seed in range(20):
        param.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()
        wanted = 0.99 * wanted + 0.01 * param.grad.double()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"].double(), wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32", "torch.float32", torch.bfloat16, "float64", None])
def test_state_dtype(state_dtype: Any, dtype: torch.dtype) -> None:
    """State in another precision than the parameters, and the result near that of float32 state."""
    bag, optimizer = MUON.pair(dtype, state_dtype=state_dtype)
    twin, other = MUON.pair(dtype)
    advance(bag, optimizer, range(4))
    advance(twin, other, range(4))
    wanted = dtype if state_dtype is None else getattr(torch, str(state_dtype).removeprefix("torch."))
    for param, exact in zip(bag.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[param]["momentum_buffer"].dtype == wanted
        assert param.dtype == dtype
        close(param.detach().float(), exact.detach().float(), 0.03)


@over_dtypes
@over_ours
def test_every_dtype(subject: Subject, dtype: torch.dtype) -> None:
    bag, optimizer = subject.pair(dtype)
    single, reference = subject.pair(torch.float64)
    for param, value in zip(single.parameters(), bag.parameters(), strict=True):
        param.data.copy_(value)
    advance(bag, optimizer, range(3))
    for seed in range(3):
        set_grads(single, seed)
        for param in single.parameters():
            param.grad = param.grad.to(dtype).double()
        reference.step()
    limit = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for param, wanted in zip(bag.parameters(), single.parameters(), strict=True):
        assert param.dtype == dtype
        close(param.detach().double(), wanted.detach(), limit)


def test_mixed_dtypes_in_one_group() -> None:
    """Fault 8."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    values = [torch.randn(6, 4) for _ in dtypes]
    together = [nn.Parameter(value.to(dtype)) for value, dtype in zip(values, dtypes, strict=True)]
    alone = [nn.Parameter(param.detach().clone()) for param in together]
    optimizers = [
        Muon(together, orthogonalize_dtype="float32"),
        *(Muon([p], orthogonalize_dtype="float32") for p in alone),
    ]
    for _ in range(2):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn(6, 4).to(one.dtype)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, dtype in zip(together, alone, dtypes, strict=True):
        assert one.dtype == dtype
        close(one.detach(), other.detach())


@over_all
def test_version_counter_moves(subject: Subject) -> None:
    """Autograd must notice a step between forward and backward."""
    bag, optimizer = subject.pair()
    versions = [param._version for param in bag.parameters()]
    advance(bag, optimizer, range(1))
    assert all(param._version > old for param, old in zip(bag.parameters(), versions, strict=True))
    loss = (bag.w0 @ bag.w1).square().sum()
    set_grads(bag, 1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@over_all
def test_parameters_stay_the_same_leaves(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    before = [(id(param), param.data_ptr()) for param in bag.parameters()]
    advance(bag, optimizer, range(2))
    assert before == [(id(param), param.data_ptr()) for param in bag.parameters()]
    assert all(param.requires_grad and param.is_leaf for param in bag.parameters())


def test_order_of_parameters_does_not_matter() -> None:
    shapes = [(6, 4), (4, 6), (5, 5), (6, 4), (3, 7), (4, 6)]
    values = [torch.randn(shape) for shape in shapes]
    results = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        params = [nn.Parameter(value.clone()) for value in values]
        optimizer = Muon([params[k] for k in order], lr=0.1, orthogonalize_dtype="float32")
        for seed in range(3):
            for k, param in enumerate(params):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * seed + k))
            optimizer.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        close(one.detach(), other.detach(), 1e-6)


def test_one_matrix_alone_or_among_others() -> None:
    """Fault 27, with neighbours of very different size."""
    value, neighbours = torch.randn(6, 10), [torch.randn(6, 10) for _ in range(4)] + [torch.randn(10, 6)]
    alone = nn.Parameter(value.clone())
    among = [nn.Parameter(value.clone()), *(nn.Parameter(other.clone()) for other in neighbours)]
    first, second = Muon([alone], orthogonalize_dtype="float32"), Muon(among, orthogonalize_dtype="float32")
    for _ in range(3):
        for k, param in enumerate(among):
            param.grad = torch.randn(param.shape) * 10.0 ** (5 * k)
        alone.grad = among[0].grad.clone()
        first.step()
        second.step()
    close(alone.detach(), among[0].detach(), 1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@over_ours
def test_zero_size_parameter(subject: Subject, shape: tuple[int, int]) -> None:
    bag = subject.bag()
    bag.register_parameter("w9", nn.Parameter(torch.empty(shape)))
    optimizer = subject.build(bag)
    twin, other = subject.pair()
    for seed in range(2):
        set_grads(bag, seed)
        for (_, param), (_, source) in zip(twin.named_parameters(), bag.named_parameters(), strict=False):
            param.grad = source.grad.clone()
        for name, param in twin.named_parameters():
            param.grad = bag.get_parameter(name).grad.clone()
        optimizer.step()
        other.step()
    for name, param in twin.named_parameters():
        close(bag.get_parameter(name).detach(), param.detach())
    again = subject.build(bag)
    again.load_state_dict(optimizer.state_dict())
    again.step()


def test_only_zero_size_parameters() -> None:
    param = nn.Parameter(torch.empty(0, 4))
    optimizer = Muon([param])
    param.grad = torch.empty(0, 4)
    optimizer.step()


@over_all
def test_frozen_in_mid_training_does_not_move(subject: Subject) -> None:
    bag, optimizer = subject.pair(weight_decay=0.5)
    advance(bag, optimizer, range(2))
    bag.w0.requires_grad_(False)
    bag.w0.grad = None
    before, momentum = (
        bag.w0.detach().clone(),
        {k: torch.as_tensor(v).clone() for k, v in optimizer.state[bag.w0].items()},
    )
    for seed in (2, 3):
        for param in bag.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert torch.equal(bag.w0, before)
    for key, value in momentum.items():
        assert torch.equal(torch.as_tensor(optimizer.state[bag.w0][key]), value)
    bag.w0.requires_grad_(True)
    advance(bag, optimizer, range(4, 5))
    assert not torch.equal(bag.w0, before)


def test_momentum_survives_freezing_of_a_neighbour() -> None:
    """Stacks are built anew when a parameter leaves; what the others had stays theirs."""
    bag, optimizer = MUON.pair()
    clean, other = MUON.pair()
    for pair in ((bag, optimizer), (clean, other)):
        advance(*pair, range(3))
    bag.w0.requires_grad_(False)
    for owner, steps in (((bag, optimizer), range(3, 6)), ((clean, other), range(3, 6))):
        for seed in steps:
            set_grads(owner[0], seed)
            owner[0].w0.grad = None
            owner[1].step()
    for mine, wanted in zip(bag.values(), clean.values(), strict=True):
        close(mine, wanted, 1e-6)
    bag.w0.requires_grad_(True)
    advance(bag, optimizer, range(6, 8))
    advance(clean, other, range(6, 8))
    for mine, wanted in zip(bag.values(), clean.values(), strict=True):
        close(mine, wanted, 1e-6)


def test_unfrozen_later_starts_from_zero_momentum() -> None:
    bag = MUON.bag()
    bag.w0.requires_grad_(False)
    optimizer = MUON.build(bag)
    before = bag.w0.detach().clone()
    for seed in range(2):
        set_grads(bag, seed)
        bag.w0.grad = None
        optimizer.step()
    assert torch.equal(bag.w0, before)
    bag.w0.requires_grad_(True)
    set_grads(bag, 5)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[bag.w0]["momentum_buffer"], bag.w0.grad * 0.05, rtol=1e-5, atol=1e-7)
    assert not torch.equal(bag.w0, before)


@over_all
def test_learning_rate_zero_moves_no_parameter(subject: Subject) -> None:
    bag, optimizer = subject.pair(lr=0.0, weight_decay=0.5)
    before = bag.values()
    advance(bag, optimizer, range(2))
    assert_same_bits(before, bag.values())


@over_ours
def test_first_step_is_descent(subject: Subject) -> None:
    bag, optimizer = subject.pair(weight_decay=0.0)
    before = bag.values()
    advance(bag, optimizer, range(1))
    for param, old in zip(bag.parameters(), before, strict=True):
        assert ((param.detach() - old) * param.grad).sum() < 0


@over_all
def test_it_trains(subject: Subject) -> None:
    bag, optimizer = subject.pair(weight_decay=0.0)
    first = None
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / 200)
        optimizer.zero_grad()
        loss = bag(torch.ones(()))
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() < 0.05 * first
