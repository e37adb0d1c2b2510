"""The torch.optim contract, part 3: copies, checkpoints, schedulers, hooks, compilation."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning_muon.optim import HybridOptimizer, Muon
from lightning_muon.partition import MatrixLayout
from tests.optim.subjects import (
    ALL,
    HYBRID,
    MUON,
    OURS,
    Bag,
    Subject,
    advance,
    assert_same_bits,
    reload,
    set_grads,
    snapshot,
    state_tensors,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import AdamW, Optimizer, lr_scheduler

over_all = pytest.mark.parametrize("subject", ALL, ids=lambda subject: subject.name)
over_ours = pytest.mark.parametrize("subject", OURS, ids=lambda subject: subject.name)


def trained(subject: Subject, dtype: torch.dtype = torch.float32, steps: int = 3, **options: Any) -> tuple[Bag, Optimizer]:
    bag, optimizer = subject.pair(dtype, **options)
    advance(bag, optimizer, range(steps))
    return bag, optimizer


def fresh(subject: Subject, values_of: Bag, dtype: torch.dtype | None = None, **options: Any) -> tuple[Bag, Optimizer]:
    """A new process: another model with the same weights, another optimizer without state."""
    bag = subject.bag(dtype or values_of.w0.dtype, seed=5)
    for param, value in zip(bag.parameters(), values_of.parameters(), strict=True):
        param.data.copy_(value.data)
    return bag, subject.build(bag, **options)


def assert_go_on_alike(first: tuple[Bag, Optimizer], second: tuple[Bag, Optimizer], steps: range = range(10, 13)) -> None:
    assert_same_bits(snapshot(*first), snapshot(*second))
    advance(*first, steps)
    advance(*second, steps)
    assert_same_bits(snapshot(*first), snapshot(*second))


@over_all
@pytest.mark.parametrize("steps", [0, 3])
def test_deepcopy(subject: Subject, steps: int) -> None:
    """Fault 33."""
    bag, optimizer = trained(subject, steps=steps)
    twin, other = copy.deepcopy((bag, optimizer))
    before = snapshot(bag, optimizer)
    advance(twin, other, range(5, 6))
    assert_same_bits(before, snapshot(bag, optimizer))
    advance(bag, optimizer, range(5, 6))
    assert_go_on_alike((bag, optimizer), (twin, other))


@over_all
@pytest.mark.parametrize("steps", [0, 3])
def test_pickle(subject: Subject, steps: int) -> None:
    """Fault 33."""
    bag, optimizer = trained(subject, steps=steps)
    twin, other = pickle.loads(pickle.dumps((bag, optimizer)))
    assert_go_on_alike((bag, optimizer), (twin, other))
    assert repr(other) == repr(optimizer)


def test_copies_keep_layouts() -> None:
    param = nn.Parameter(torch.randn(12, 5))
    layouts = [MatrixLayout(split=(6, 4, 2))]
    optimizer = Muon([{"params": [param], "layouts": layouts}], orthogonalize_dtype="float32")
    for other_param, other in (copy.deepcopy((param, optimizer)), pickle.loads(pickle.dumps((param, optimizer)))):
        grad = torch.randn(12, 5)
        mine = nn.Parameter(param.detach().clone())
        wanted = Muon([{"params": [mine], "layouts": layouts}], orthogonalize_dtype="float32")
        other_param.grad, mine.grad = grad.clone(), grad.clone()
        other.step()
        wanted.step()
        assert torch.equal(other_param, mine)


@over_all
def test_resume_is_exact(subject: Subject) -> None:
    bag, optimizer = trained(subject)
    twin, other = fresh(subject, bag)
    other.load_state_dict(reload(optimizer.state_dict()))
    assert_same_bits(bag.values(), twin.values())
    advance(bag, optimizer, range(10, 14))
    advance(twin, other, range(10, 14))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


@over_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_through_a_file_is_exact(subject: Subject, dtype: torch.dtype, tmp_path: Path) -> None:
    bag, optimizer = trained(subject, dtype)
    torch.save({"model": bag.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    twin = subject.bag(dtype, seed=8)
    twin.load_state_dict(loaded["model"])
    other = subject.build(twin)
    other.load_state_dict(loaded["optimizer"])
    advance(bag, optimizer, range(10, 14))
    advance(twin, other, range(10, 14))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


@over_all
def test_state_dict_of_a_state_dict(subject: Subject) -> None:
    """Saving, loading and saving again, without a step in between, gives the same."""
    bag, optimizer = trained(subject)
    saved = reload(optimizer.state_dict())
    _, other = fresh(subject, bag)
    other.load_state_dict(reload(saved))
    again = other.state_dict()
    assert saved["param_groups"] == again["param_groups"]
    assert saved["state"].keys() == again["state"].keys()
    for key, entries in saved["state"].items():
        assert entries.keys() == again["state"][key].keys()
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again["state"][key][name]))


@over_ours
def test_state_has_the_shape_of_its_parameter(subject: Subject) -> None:
    _, optimizer = trained(subject)
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert optimizer.state[param]
            for key, value in optimizer.state[param].items():
                assert key == "step" or value.shape == param.shape


def test_saving_one_state_does_not_save_the_others(tmp_path: Path) -> None:
    """The file is as large as the state, whatever memory the tensors share."""
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(8)]
    optimizer = Muon(params)
    for param in params:
        param.grad = torch.randn(64, 64)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "all.pt")
    elements = 8 * 64 * 64 * 4
    assert elements <= (tmp_path / "all.pt").stat().st_size < 1.3 * elements


@over_ours
def test_load_copies_what_it_is_given(subject: Subject) -> None:
    """Later steps write neither into the loaded dict nor, through it, into the optimizer that made it."""
    bag, optimizer = trained(subject)
    saved = optimizer.state_dict()
    before = reload(saved)
    twin, other = fresh(subject, bag)
    other.load_state_dict(saved)
    advance(twin, other, range(5, 8))
    for index, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        if "momentum_buffer" in optimizer.state[param]:
            wanted = before["state"][index]["momentum_buffer"]
            assert torch.equal(saved["state"][index]["momentum_buffer"], wanted)
            assert torch.equal(optimizer.state[param]["momentum_buffer"], wanted)


@over_ours
def test_load_copies_at_once(subject: Subject) -> None:
    """Steps of the optimizer that made the state dict do not reach the one that loaded it."""
    bag, optimizer = trained(subject)
    twin, other = fresh(subject, bag)
    other.load_state_dict(optimizer.state_dict())
    wanted = [optimizer.state[param]["momentum_buffer"].clone() for _, param in bag.named("w")]
    advance(bag, optimizer, range(5, 8))
    assert_same_bits(wanted, [other.state[param]["momentum_buffer"] for _, param in twin.named("w")])


@over_ours
def test_load_moves_nothing(subject: Subject) -> None:
    bag, optimizer = trained(subject)
    twin, other = fresh(subject, bag)
    before = twin.values()
    other.load_state_dict(reload(optimizer.state_dict()))
    assert_same_bits(before, twin.values())


@over_all
def test_load_before_the_first_step(subject: Subject) -> None:
    """A checkpoint of an optimizer that has not stepped yet."""
    bag, optimizer = subject.pair()
    twin, other = fresh(subject, bag)
    other.load_state_dict(reload(optimizer.state_dict()))
    assert_go_on_alike((bag, optimizer), (twin, other))


@over_all
def test_load_into_an_optimizer_that_has_stepped(subject: Subject) -> None:
    bag, optimizer = trained(subject)
    twin, other = fresh(subject, bag)
    advance(twin, other, range(20, 22))
    for param, value in zip(twin.parameters(), bag.parameters(), strict=True):
        param.data.copy_(value)
    other.load_state_dict(reload(optimizer.state_dict()))
    advance(bag, optimizer, range(10, 13))
    advance(twin, other, range(10, 13))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


@over_all
def test_load_restores_options(subject: Subject) -> None:
    bag, optimizer = trained(subject)
    for group in optimizer.param_groups:
        group["lr"] = 0.007
    _, other = fresh(subject, bag, lr=0.5, weight_decay=0.0)
    other.load_state_dict(reload(optimizer.state_dict()))
    for group in other.param_groups:
        assert group["lr"] == 0.007
        assert group["weight_decay"] == 0.1


@over_all
def test_loading_does_not_change_what_is_loaded(subject: Subject) -> None:
    bag, optimizer = trained(subject)
    saved = reload(optimizer.state_dict())
    kept = reload(saved)
    _, other = fresh(subject, bag)
    other.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"]
    assert saved["state"].keys() == kept["state"].keys()


@over_all
@pytest.mark.parametrize("wrong", ["fewer groups", "fewer parameters"])
def test_state_of_another_shape_is_refused(subject: Subject, wrong: str) -> None:
    bag, optimizer = trained(subject)
    saved = reload(optimizer.state_dict())
    if wrong == "fewer groups":
        saved["param_groups"] = saved["param_groups"][:-1]
    else:
        saved["param_groups"][-1]["params"].pop()
    _, other = fresh(subject, bag)
    with pytest.raises(ValueError):
        other.load_state_dict(saved)


def test_momentum_of_another_shape_is_refused_by_name() -> None:
    bag, optimizer = trained(MUON)
    saved = reload(optimizer.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.zeros(7, 4)
    twin, other = fresh(MUON, bag)
    with pytest.raises(ValueError, match="w0"):
        other.load_state_dict(saved)
        advance(twin, other, range(1))


@over_ours
def test_float32_state_survives_a_bfloat16_resume(subject: Subject) -> None:
    """Fault 8: torch's own load_state_dict would round it to the parameters' dtype."""
    bag, optimizer = trained(subject, torch.bfloat16)
    twin, other = fresh(subject, bag)
    other.load_state_dict(reload(optimizer.state_dict()))
    for (_, first), (_, second) in zip(bag.named("w"), twin.named("w"), strict=True):
        one, two = optimizer.state[first]["momentum_buffer"], other.state[second]["momentum_buffer"]
        assert one.dtype == two.dtype == torch.float32
        assert torch.equal(one, two)
        assert not torch.equal(one, one.bfloat16().float())
    assert_go_on_alike((bag, optimizer), (twin, other))


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state_dtype", ["float32", None])
@over_ours
def test_load_casts(subject: Subject, state_dtype: str | None, dtype: torch.dtype, saved_dtype: torch.dtype) -> None:
    """Fault 8: state of a model of another precision is taken over in the precision that this optimizer keeps."""
    bag, optimizer = trained(subject, saved_dtype, state_dtype=state_dtype)
    twin, other = fresh(subject, bag, dtype, state_dtype=state_dtype)
    other.load_state_dict(reload(optimizer.state_dict()))
    advance(twin, other, range(5, 7))
    kept = torch.float64 if dtype == torch.float64 else torch.float32 if state_dtype else dtype
    for _, param in twin.named("w"):
        assert param.isfinite().all()
        assert other.state[param]["momentum_buffer"].dtype == kept


@over_all
def test_partial_state(subject: Subject) -> None:
    """One parameter never had a gradient."""
    bag, optimizer = subject.pair()
    for seed in range(2):
        set_grads(bag, seed)
        bag.w1.grad = None
        optimizer.step()
    twin, other = fresh(subject, bag)
    other.load_state_dict(reload(optimizer.state_dict()))
    for pair in ((bag, optimizer), (twin, other)):
        set_grads(pair[0], 5)
        pair[0].w1.grad = None
        pair[1].step()
    assert_same_bits(bag.values(), twin.values())
    advance(bag, optimizer, range(6, 8))
    advance(twin, other, range(6, 8))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


@over_all
def test_state_dict_without_state_of_some_parameters_is_taken(subject: Subject) -> None:
    bag, optimizer = trained(subject)
    saved = reload(optimizer.state_dict())
    del saved["state"][0]
    twin, other = fresh(subject, bag)
    other.load_state_dict(saved)
    advance(twin, other, range(5, 6))
    assert all(param.isfinite().all() for param in twin.parameters())


@over_all
def test_loads_a_group_without_newer_options(subject: Subject) -> None:
    """A checkpoint of an older version lacks options that were added since: they take their defaults."""
    bag, optimizer = trained(subject)
    saved = reload(optimizer.state_dict())
    missing = {"maximize", "foreach", "nonfinite", "cautious", "state_dtype"}
    for group in saved["param_groups"]:
        for key in missing:
            group.pop(key, None)
    twin, other = fresh(subject, bag)
    other.load_state_dict(saved)
    advance(bag, optimizer, range(5, 7))
    advance(twin, other, range(5, 7))
    assert_same_bits(bag.values(), twin.values())


@over_all
def test_state_dict_hooks(subject: Subject) -> None:
    bag, optimizer = trained(subject)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: calls.append("post save"))
    saved = reload(optimizer.state_dict())
    _, other = fresh(subject, bag)
    other.register_load_state_dict_pre_hook(lambda opt, state: calls.append("pre load"))
    other.register_load_state_dict_post_hook(lambda opt: calls.append("post load"))
    other.load_state_dict(saved)
    assert calls == ["pre save", "post save", "pre load", "post load"]


@over_all
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_dcp_state_dict_round_trip(subject: Subject, flatten: bool) -> None:
    bag, optimizer = trained(subject)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = reload(get_optimizer_state_dict(bag, optimizer, options=options))
    twin, other = fresh(subject, bag, lr=0.5)
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert_same_bits(bag.values(), twin.values())
    advance(bag, optimizer, range(10, 13))
    advance(twin, other, range(10, 13))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


@pytest.fixture
def quiet_dcp() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
        yield


@over_all
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_dcp_file_round_trip(subject: Subject, flatten: bool, tmp_path: Path, quiet_dcp: None) -> None:
    bag, optimizer = trained(subject)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model_state, optimizer_state = get_state_dict(bag, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "dcp")
    twin = subject.bag(seed=9)
    other = subject.build(twin, lr=0.5)
    model_state, optimizer_state = get_state_dict(twin, other, options=options)
    target = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(target, checkpoint_id=tmp_path / "dcp")
    set_state_dict(
        twin, other, model_state_dict=target["model"], optim_state_dict=target["optimizer"], options=options
    )
    advance(bag, optimizer, range(10, 13))
    advance(twin, other, range(10, 13))
    assert_same_bits(snapshot(bag, optimizer), snapshot(twin, other))


@over_all
def test_dcp_before_the_first_step_moves_nothing(subject: Subject) -> None:
    """DCP makes the state by a step with zero gradients and lr = 0."""
    bag, optimizer = subject.pair()
    before = bag.values()
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = get_optimizer_state_dict(bag, optimizer)
    assert_same_bits(before, bag.values())
    assert rates == [group["lr"] for group in optimizer.param_groups]
    assert all(param.grad is None for param in bag.parameters())
    assert set(saved["state"]) == {name for name, _ in bag.named_parameters()}


def test_dcp_of_a_matrix_that_never_had_a_gradient(tmp_path: Path, quiet_dcp: None) -> None:
    """Fault 17: state for every trainable matrix, so that what is saved and what is loaded have the same keys."""
    bag, optimizer = MUON.pair()
    for seed in range(2):
        set_grads(bag, seed)
        bag.w1.grad = None
        optimizer.step()
    saved = get_optimizer_state_dict(bag, optimizer)
    assert set(saved["state"]) == {name for name, _ in bag.named_parameters()}
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "dcp")
    twin, other = fresh(MUON, bag)
    target = {"optimizer": get_optimizer_state_dict(twin, other)}
    dcp.load(target, checkpoint_id=tmp_path / "dcp")
    set_optimizer_state_dict(twin, other, target["optimizer"])
    advance(bag, optimizer, range(5, 7))
    advance(twin, other, range(5, 7))
    assert_same_bits(bag.values(), twin.values())


def test_dcp_of_a_hybrid_with_a_matrix_that_never_had_a_gradient(tmp_path: Path, quiet_dcp: None) -> None:
    bag, optimizer = HYBRID.pair()
    for seed in range(2):
        set_grads(bag, seed)
        bag.w1.grad = None
        optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(bag, optimizer)}, checkpoint_id=tmp_path / "dcp")
    twin, other = fresh(HYBRID, bag)
    target = {"optimizer": get_optimizer_state_dict(twin, other)}
    dcp.load(target, checkpoint_id=tmp_path / "dcp")
    set_optimizer_state_dict(twin, other, target["optimizer"])
    advance(bag, optimizer, range(5, 7))
    advance(twin, other, range(5, 7))
    assert_same_bits(bag.values(), twin.values())


@over_all
def test_frozen_parameter_in_dcp(subject: Subject) -> None:
    def frozen() -> tuple[Bag, Optimizer]:
        bag = subject.bag()
        bag.w1.requires_grad_(False)
        return bag, subject.build(bag)

    def train(bag: Bag, optimizer: Optimizer, steps: range) -> None:
        for seed in steps:
            set_grads(bag, seed)
            bag.w1.grad = None
            optimizer.step()

    bag, optimizer = frozen()
    train(bag, optimizer, range(3))
    saved = reload(get_optimizer_state_dict(bag, optimizer))
    twin, other = frozen()
    twin.load_state_dict(bag.state_dict())
    set_optimizer_state_dict(twin, other, saved)
    train(bag, optimizer, range(5, 7))
    train(twin, other, range(5, 7))
    assert_same_bits(bag.values(), twin.values())


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
    momenta = []
    for step in range(8):
        advance(bag, optimizer, range(step, step + 1))
        scheduler.step()
        momenta.append(optimizer.param_groups[-1].get("momentum", optimizer.param_groups[-1].get("betas")))
        for group in optimizer.param_groups:
            assert 0 <= group.get("momentum", 0.9) < 1
            assert len(group.get("betas", (0.9, 0.999))) == 2
    assert len(set(momenta)) > 1
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
            torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], param.grad * 0.05, rtol=1e-5, atol=1e-7)


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
            torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], param.grad * 0.05, rtol=1e-5, atol=1e-7)


def test_subclass_with_its_own_rule() -> None:
    """A rule is two methods; the base does the rest."""
    from lightning_muon.optim import MatrixOptimizer

    class SignDescent(MatrixOptimizer):
        def __init__(self, params: Any, lr: float = 1e-3, **shared: Any) -> None:
            super().__init__(params, {"lr": lr, "weight_decay": 0.0}, **shared)

        def init_state(self, stack: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"steps": stack.new_zeros(stack.shape[0]), "second": torch.zeros_like(stack)}

        def direction(
            self, grad: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]
        ) -> torch.Tensor:
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
    bag, optimizer = trained(HYBRID)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert isinstance(other, HybridOptimizer)
    assert list(other.optimizers) == ["other", "matrix"]
    assert isinstance(other.optimizers["other"], AdamW)
    for child in other.optimizers.values():
        assert all(any(group is own for own in other.param_groups) for group in child.param_groups)
