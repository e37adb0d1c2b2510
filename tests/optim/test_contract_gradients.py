"""The torch.optim contract, part 2: what a step does with gradients of all kinds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import Muon
from lightning_muon.partition import MatrixLayout
from tests.optim.subjects import (
    HYBRID,
    MUON,
    Subject,
    advance,
    assert_same_bits,
    close,
    over_all,
    over_dtypes,
    over_ours,
    set_grads,
    snapshot,
    state_tensors,
)


@over_all
def test_no_gradient_no_change(subject: Subject) -> None:
    """Fault 10: a missing gradient is not a zero gradient. Nothing decays, nothing coasts on momentum."""
    bag, optimizer = subject.pair(weight_decay=0.5)
    advance(bag, optimizer, range(2))
    set_grads(bag, 7)
    spared = [bag.w1] + ([bag.v0] if hasattr(bag, "v0") else [])
    for param in spared:
        param.grad = None
    before = bag.values()
    kept = [state.clone() for param in spared for state in optimizer.state[param].values() if isinstance(state, Tensor)]
    optimizer.step()
    after = [state for param in spared for state in optimizer.state[param].values() if isinstance(state, Tensor)]
    assert_same_bits(kept, after)
    for (name, param), old in zip(bag.named_parameters(), before, strict=True):
        assert torch.equal(param, old) == any(param is other for other in spared), name
        assert (param.grad is None) == any(param is other for other in spared)


@over_all
def test_no_gradients_at_all_is_a_noop(subject: Subject) -> None:
    bag, optimizer = subject.pair(weight_decay=0.5)
    before = bag.values()
    optimizer.step()
    assert_same_bits(before, bag.values())
    advance(bag, optimizer, range(2))
    optimizer.zero_grad()
    before = snapshot(bag, optimizer)
    optimizer.step()
    assert_same_bits(before, snapshot(bag, optimizer))


@over_dtypes
@over_all
def test_zero_gradients_leave_parameters(subject: Subject, dtype: torch.dtype) -> None:
    """Fault 1: 0 / 0 in the normalization."""
    bag, optimizer = subject.pair(dtype, weight_decay=0.0)
    before = bag.values()
    for _ in range(2):
        for param in bag.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same_bits(before, bag.values())
    assert all(tensor.isfinite().all() for tensor in state_tensors(optimizer))
    advance(bag, optimizer, range(1))
    for old, new in zip(before, bag.values(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


@over_all
def test_weight_decay_is_exact_and_unscaled(subject: Subject) -> None:
    """Fault 30: p (1 - lr wd), whatever the shape scale."""
    bag, optimizer = subject.pair(lr=0.1, weight_decay=0.5)
    before = bag.values()
    for param in bag.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for old, new in zip(before, bag.values(), strict=True):
        torch.testing.assert_close(new, old * 0.95, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cautious", [True, False])
def test_zero_update_counts_as_aligned(cautious: bool) -> None:
    param = nn.Parameter(torch.randn(4, 6))
    before = param.detach().clone()
    optimizer = Muon([param], lr=0.1, weight_decay=0.5, cautious=cautious)
    param.grad = torch.zeros(4, 6)
    optimizer.step()
    torch.testing.assert_close(param.detach(), before * 0.95, rtol=1e-6, atol=0)


def test_cautious_decay_leaves_entries_that_the_update_enlarges() -> None:
    param = nn.Parameter(torch.randn(8, 12))
    twin = nn.Parameter(param.detach().clone())
    before = param.detach().clone()
    decaying = Muon([param], lr=0.01, weight_decay=1.0, cautious=True, orthogonalize_dtype="float32")
    plain = Muon([twin], lr=0.01, weight_decay=0.0, orthogonalize_dtype="float32")
    param.grad = torch.randn(8, 12)
    twin.grad = param.grad.clone()
    decaying.step()
    plain.step()
    towards_zero = (twin.detach() - before) * before <= 0
    assert 0.2 < towards_zero.float().mean() < 0.8
    close((param - twin).detach(), torch.where(towards_zero, -0.01 * before, torch.zeros_like(before)), 1e-6)


@over_ours
def test_sparse_gradient_is_refused(subject: Subject) -> None:
    bag, optimizer = subject.pair()
    set_grads(bag, 0)
    bag.w0.grad = bag.w0.grad.to_sparse()
    before = [param.detach().clone() for param in bag.parameters()]
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError), match=r"(?i)sparse"):
        optimizer.step()
    assert torch.equal(bag.w0, before[0])


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_sparse_gradient_is_refused_where_gradients_are_watched(nonfinite: str) -> None:
    bag, optimizer = MUON.pair(nonfinite=nonfinite)
    set_grads(bag, 0)
    bag.w0.grad = bag.w0.grad.to_sparse()
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError), match=r"sparse.*w0|w0.*sparse"):
        optimizer.step()


def test_sparse_gradient_is_refused_before_anything_moves() -> None:
    """Half a step would be worse than none: the run may be saved by what catches the error."""
    bag, optimizer = HYBRID.pair()
    advance(bag, optimizer, range(1))
    set_grads(bag, 1)
    bag.w3.grad = bag.w3.grad.to_sparse()
    before = snapshot(bag, optimizer)
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError), match="sparse"):
        optimizer.step()
    assert_same_bits(before, snapshot(bag, optimizer))


SCALES = [1e-30, 1e-20, 1e-10, 1e-5, 1e5, 1e15, 1e30]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_update_does_not_depend_on_the_scale_of_gradients(products: str, nesterov: bool, scale: float) -> None:
    """Faults 2 and 5: from zero weights, three steps of g and of c g end in the same place."""
    results = []
    for factor in (1.0, scale):
        params = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 10), (10, 6), (8, 8))]
        optimizer = Muon(params, lr=0.1, nesterov=nesterov, orthogonalize_dtype=products)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator) * factor
            optimizer.step()
        results.append([param.detach() for param in params])
    for plain, scaled in zip(*results, strict=True):
        cosine = torch.nn.functional.cosine_similarity(plain.flatten(), scaled.flatten(), dim=0)
        assert cosine > 0.999
        assert float(scaled.norm() / plain.norm()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_update_of_bfloat16_parameters_does_not_depend_on_the_scale(scale: float) -> None:
    results = []
    for factor in (1.0, scale):
        param = nn.Parameter(torch.zeros(6, 10, dtype=torch.bfloat16))
        optimizer = Muon([param], lr=0.1, orthogonalize_dtype="float32")
        param.grad = (torch.randn(6, 10, generator=torch.Generator().manual_seed(3)) * factor).bfloat16()
        optimizer.step()
        results.append(param.detach().float())
    close(results[0], results[1], 3e-3)


def test_clipping_by_a_tiny_norm_changes_nothing() -> None:
    """Fault 3: gradients clipped to a norm of 1e-6 keep their direction, and so the update its size."""
    results = []
    for limit in (None, 1e-6, 1e-20):
        bag, optimizer = MUON.pair()
        for seed in range(3):
            set_grads(bag, 0, scale=1.0 + seed)
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(bag.parameters(), limit)
            optimizer.step()
        results.append(bag.values())
    for clipped in results[1:]:
        for plain, other in zip(results[0], clipped, strict=True):
            close(other, plain, 1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_propagate_stays_in_its_matrix(bad: float) -> None:
    bag, optimizer = MUON.pair()
    clean, other = MUON.pair()
    advance(clean, other, range(1))
    set_grads(bag, 0)
    bag.w0.grad[1, 1] = bad  # w3 has the same shape, w1 its transpose
    optimizer.step()
    assert not bag.w0.isfinite().all()
    for name in ("w1", "w2", "w3"):
        close(getattr(bag, name).detach(), getattr(clean, name).detach())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_skip_leaves_parameter_and_state(bad: float) -> None:
    bag, optimizer = MUON.pair(nonfinite="skip")
    clean, other = MUON.pair()
    advance(bag, optimizer, range(2))
    advance(clean, other, range(2))
    weight, momentum = bag.w0.detach().clone(), optimizer.state[bag.w0]["momentum_buffer"].clone()
    set_grads(bag, 2)
    set_grads(clean, 2)
    bag.w0.grad[1, 1] = bad
    clean.w0.grad = None
    optimizer.step()
    other.step()
    assert torch.equal(bag.w0, weight)
    assert torch.equal(optimizer.state[bag.w0]["momentum_buffer"], momentum)
    advance(bag, optimizer, range(3, 5))
    advance(clean, other, range(3, 5))
    for mine, wanted in zip(bag.values(), clean.values(), strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_raise_changes_nothing(bad: float) -> None:
    """In the hybrid too: AdamW's half must not have moved when the error comes."""
    for subject in (MUON, HYBRID):
        check_that_raise_changes_nothing(subject, bad)


def check_that_raise_changes_nothing(subject: Subject, bad: float) -> None:
    bag, optimizer = subject.pair(nonfinite="raise")
    advance(bag, optimizer, range(2))
    before = snapshot(bag, optimizer)
    set_grads(bag, 2)
    bag.w2.grad[0, 0] = bad
    with pytest.raises(FloatingPointError, match="w2"):
        optimizer.step()
    assert_same_bits(before, snapshot(bag, optimizer))


@over_all
def test_gradients_are_not_modified(subject: Subject) -> None:
    """Fault 9."""
    for dtype in (torch.float32, torch.bfloat16):
        bag, optimizer = subject.pair(dtype)
        for seed in range(2):
            set_grads(bag, seed)
            grads = [param.grad for param in bag.parameters()]
            before = [(grad.clone(), grad._version) for grad in grads]
            optimizer.step()
            for param, grad, (copy, version) in zip(bag.parameters(), grads, before, strict=True):
                assert param.grad is grad
                assert torch.equal(grad, copy)
                assert grad._version == version


def transposed(grad: Tensor) -> Tensor:
    return grad.T.contiguous().T


def strided(grad: Tensor) -> Tensor:
    wide = grad.new_zeros(2 * grad.shape[0], 3 * grad.shape[1])
    wide[::2, ::3] = grad
    return wide[::2, ::3]


@pytest.mark.parametrize("reshape", [transposed, strided])
@pytest.mark.parametrize("which", ["gradient", "parameter", "both"])
def test_strides_do_not_matter(which: str, reshape: Any) -> None:
    """Fault 26."""
    values = [torch.randn(6, 10), torch.randn(10, 6), torch.randn(8, 8)]
    straight = [nn.Parameter(value.clone()) for value in values]
    odd = [nn.Parameter(reshape(value.clone()) if which != "gradient" else value.clone()) for value in values]
    first, second = (Muon(params, lr=0.1, orthogonalize_dtype="float32") for params in (straight, odd))
    for _ in range(3):
        for one, other in zip(straight, odd, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = reshape(one.grad) if which != "parameter" else one.grad.clone()
        first.step()
        second.step()
    for one, other in zip(straight, odd, strict=True):
        close(one.detach(), other.detach())


def test_expanded_gradient() -> None:
    """The gradient of a sum is one number seen from everywhere; writing to it would be an error."""
    param = nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([param], orthogonalize_dtype="float32")
    before = param.detach().clone()
    param.sum().backward()
    param.grad = torch.ones(1, 1).expand(4, 6)
    optimizer.step()
    assert param.isfinite().all()
    assert not torch.equal(param, before)


@pytest.mark.parametrize("which", ["gradient", "parameter", "both"])
def test_channels_last(which: str) -> None:
    value = torch.randn(8, 4, 3, 3)
    plain = nn.Parameter(value.clone())
    odd = nn.Parameter(value.clone().to(memory_format=torch.channels_last) if which != "gradient" else value.clone())
    layouts = [MatrixLayout()]
    first, second = (
        Muon([{"params": [param], "layouts": layouts}], lr=0.1, orthogonalize_dtype="float32") for param in (plain, odd)
    )
    for _ in range(3):
        plain.grad = torch.randn(8, 4, 3, 3)
        odd.grad = plain.grad.clone()
        if which != "parameter":
            odd.grad = odd.grad.to(memory_format=torch.channels_last)
        first.step()
        second.step()
    close(plain.detach(), odd.detach())
    assert odd.is_contiguous(memory_format=torch.channels_last) == (which != "gradient")
