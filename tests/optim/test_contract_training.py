"""The torch.optim contract, part 4: closures, accumulation, GradScaler, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_muon.optim import HybridOptimizer, Muon
from tests.live_memory import LiveMemory
from tests.optim.subjects import (
    EPS,
    HYBRID,
    MUON,
    Subject,
    advance,
    assert_same_bits,
    close,
    over_all,
    set_grads,
    snapshot,
    state_tensors,
)


@over_all
def test_closure(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    twin, other = subject.pair()
    calls = []

    def closure() -> Tensor:
        calls.append([param.detach().clone() for param in bag.parameters()])
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = bag(torch.ones(()))
        loss.backward()
        return loss

    before = bag.values()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1
    assert_same_bits(before, calls[0])
    twin(torch.ones(())).backward()
    other.step()
    torch.testing.assert_close(loss, bag_loss(before, twin))
    assert_same_bits(bag.values(), twin.values())
    assert optimizer.step() is None
    assert optimizer.step(closure=closure) is not None


def bag_loss(values: list[Tensor], like: nn.Module) -> Tensor:
    twin = type(like)(vectors=tuple(tuple(p.shape) for n, p in like.named_parameters() if n.startswith("v")))
    for param, value in zip(twin.parameters(), values, strict=True):
        param.data.copy_(value)
    return twin(torch.ones(()))


@over_all
def test_step_and_closure_leave_grad_mode_alone(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    advance(bag, optimizer, range(1))
    assert torch.is_grad_enabled()
    assert all(not tensor.requires_grad for tensor in state_tensors(optimizer))


@over_all
def test_zero_grad(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    set_grads(bag, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in bag.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in bag.parameters())


@over_all
def test_accumulation_equals_one_large_batch(subject: Subject) -> None:
    """Fault 28: orthogonalized once a step, not once a micro-batch."""
    whole, first = subject.pair()
    parts, second = subject.pair()
    for _ in range(3):
        inputs = torch.randn(8)
        first.zero_grad()
        torch.stack([whole(x) for x in inputs]).mean().backward()
        first.step()
        second.zero_grad()
        for micro in inputs.split(2):
            (torch.stack([parts(x) for x in micro]).mean() / 4).backward()
        second.step()
    for one, other in zip(whole.values(), parts.values(), strict=True):
        close(one, other, 2e-4)


@over_all
def test_overflow_step_under_grad_scaler_changes_nothing(subject: Subject) -> None:
    """Fault 4."""
    bag, optimizer = subject.pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step(spoil: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(bag(torch.ones(()))).backward()
        if spoil:
            bag.w1.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()

    scaled_step(spoil=False)
    before = snapshot(bag, optimizer)
    scaled_step(spoil=True)
    assert_same_bits(before, snapshot(bag, optimizer))
    scaled_step(spoil=False)
    after = snapshot(bag, optimizer)
    assert all(tensor.isfinite().all() for tensor in after)
    assert not torch.equal(after[0], before[0])


@over_all
def test_grad_scaler_equals_no_scaler(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    twin, other = subject.pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(bag(torch.ones(()))).backward()
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        twin(torch.ones(())).backward()
        other.step()
    for one, wanted in zip(bag.values(), twin.values(), strict=True):
        close(one, wanted)


@pytest.mark.parametrize("nesterov", [True, False])
def test_result_does_not_depend_on_the_chunks_of_a_stack(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 32: the cap on a stack bounds memory and changes no result."""
    from lightning_muon.optim import stacks

    def train() -> list[Tensor]:
        params = [nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(k))) for k in range(7)]
        params.append(nn.Parameter(torch.randn(10, 6, generator=torch.Generator().manual_seed(99))))
        optimizer = Muon(params, lr=0.1, nesterov=nesterov, orthogonalize_dtype="float32")
        for seed in range(3):
            for k, param in enumerate(params):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * seed + k))
            optimizer.step()
        return [param.detach() for param in params]

    whole = train()
    monkeypatch.setattr(stacks, "MAX_STACK_ELEMENTS_CPU", 130)
    for one, other in zip(whole, train(), strict=True):
        close(one, other, 1e-6)


def test_peak_memory_of_many_matrices_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 32: no tensor that a step makes is larger than a few times the cap."""
    from lightning_muon.optim import stacks

    monkeypatch.setattr(stacks, "MAX_STACK_ELEMENTS_CPU", 4 * 32 * 32)
    params = [nn.Parameter(torch.randn(32, 32)) for _ in range(64)]
    optimizer = Muon(params)
    for param in params:
        param.grad = torch.randn(32, 32)
    with LiveMemory() as live:
        optimizer.step()
    assert live.largest <= 4 * 32 * 32 * 4  # bytes of float32


def test_same_result_beside_another_optimizer() -> None:
    """Matrices of a hybrid train as under Muon alone, the rest as under AdamW alone."""
    bag, optimizer = HYBRID.pair()
    twin = HYBRID.bag()
    alone: list[Optimizer] = [AdamW(twin.named("v"), lr=0.02, weight_decay=0.1, eps=EPS), MUON.build(twin)]
    for seed in range(4):
        set_grads(bag, seed)
        set_grads(twin, seed)
        optimizer.step()
        for child in alone:
            child.step()
    assert isinstance(optimizer, HybridOptimizer)
    assert_same_bits(bag.values(), twin.values())
