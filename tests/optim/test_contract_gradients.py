"""The torch.optim contract, part 2: what a step does with gradients of all kinds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning_muon.optim import HybridOptimizer, Muon
from lightning_muon.partition import MatrixLayout
from tests.optim.subjects import (
    ALL,
    EPS,
    HYBRID,
    MUON,
    OURS,
    Subject,
    advance,
    assert_same_bits,
    set_grads,
    snapshot,
    state_tensors,
)
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

over_all = pytest.mark.parametrize("subject", ALL, ids=lambda subject: subject.name)
over_ours = pytest.mark.parametrize("subject", OURS, ids=lambda subject: subject.name)
over_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).split(".")[1]
)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


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
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError), match="(?i)sparse"):
        optimizer.step()
    assert torch.equal(bag.w0, before[0])


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
    bag, optimizer = MUON.pair(nonfinite="raise")
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
        torch.testing.assert_close(buffer.double(), torch.full(param.shape, 0.1, dtype=torch.float64), rtol=4e-3, atol=0)
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
    optimizers = [Muon(together, orthogonalize_dtype="float32"), *(Muon([p], orthogonalize_dtype="float32") for p in alone)]
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
    before, momentum = bag.w0.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in optimizer.state[bag.w0].items()}
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
    monkeypatch.setattr(stacks, "MAX_STACK_ELEMENTS", 130)
    for one, other in zip(whole, train(), strict=True):
        close(one, other, 1e-6)


def test_peak_memory_of_many_matrices_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 32: no tensor that a step makes is larger than a few times the cap."""
    from lightning_muon.optim import stacks
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(stacks, "MAX_STACK_ELEMENTS", 4 * 32 * 32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    params = [nn.Parameter(torch.randn(32, 32)) for _ in range(64)]
    optimizer = Muon(params)
    for param in params:
        param.grad = torch.randn(32, 32)
    with Watch():
        optimizer.step()
    assert largest <= 4 * 32 * 32


def test_observers_see_the_update() -> None:
    """What observe_updates hands over is what the step subtracts, over the learning rate."""
    conv, fused, plain = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.randn(9, 4))
    layouts = [MatrixLayout(), MatrixLayout(split=(6, 4, 2)), MatrixLayout()]
    named = [("conv", conv), ("fused", fused), ("plain", plain)]
    optimizer = Muon([{"params": named, "layouts": layouts}], lr=0.1, weight_decay=0.0, orthogonalize_dtype="float32")
    seen: dict[str, Tensor] = {}
    handle = optimizer.observe_updates(seen.__setitem__)
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
    handles = optimizer.observe_updates(lambda name, update: seen.append(name))
    set_grads(bag, 0)
    bag.w1.grad = None
    optimizer.step()
    assert sorted(seen) == ["w0", "w2", "w3"]
    for handle in handles if isinstance(handles, list) else [handles]:
        handle.remove()
    optimizer.step()
    assert len(seen) == 3


def test_observing_changes_no_result() -> None:
    bag, optimizer = MUON.pair(weight_decay=0.3)
    twin, other = MUON.pair(weight_decay=0.3)
    optimizer.observe_updates(lambda name, update: update.zero_())  # the update is the observer's to keep
    advance(bag, optimizer, range(3))
    advance(twin, other, range(3))
    assert_same_bits(bag.values(), twin.values())


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
