"""The torch.optim contract, part 6: torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from tests.optim.subjects import (
    HYBRID,
    MUON,
    Bag,
    Subject,
    advance,
    assert_same_bits,
    fresh,
    over_all,
    reload,
    set_grads,
    snapshot,
    trained,
)


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
    set_state_dict(twin, other, model_state_dict=target["model"], optim_state_dict=target["optimizer"], options=options)
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
