"""The torch.optim contract, part 5: copies and checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_muon.optim import SWAN, HybridOptimizer, Muon, NorMuon
from lightning_muon.partition import MatrixLayout
from tests.optim.subjects import (
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
        saved["param_groups"][-1]["param_names"].pop()
    _, other = fresh(subject, bag)
    with pytest.raises(ValueError, match=r"group|checkpoint"):
        other.load_state_dict(saved)


def test_momentum_of_another_shape_is_refused_by_name() -> None:
    bag, optimizer = trained(MUON)
    saved = reload(optimizer.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.zeros(7, 4)
    twin, other = fresh(MUON, bag)

    def use() -> None:
        other.load_state_dict(saved)
        advance(twin, other, range(1))

    with pytest.raises(ValueError, match="w0"):
        use()


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


@pytest.mark.parametrize("hybrid", [False, True], ids=["alone", "hybrid"])
@pytest.mark.parametrize(("saved", "loading"), [(Muon, NorMuon), (NorMuon, Muon), (Muon, SWAN)])
def test_state_of_another_rule_is_refused(saved: type[Any], loading: type[Any], hybrid: bool) -> None:
    """Half of a state would go on with the other half new, and say nothing."""

    def build(bag: Bag, rule: type[Any]) -> Optimizer:
        matrix = rule(bag.named("w"), lr=0.02)
        return HybridOptimizer({"other": AdamW(bag.named("v")), "matrix": matrix}) if hybrid else matrix

    bag = Bag(vectors=((3,),) if hybrid else ())
    optimizer = build(bag, saved)
    advance(bag, optimizer, range(2))
    with pytest.raises(ValueError, match=rf"'w0' has .*, but {loading.__name__} keeps .* saved by another rule"):
        build(bag, loading).load_state_dict(reload(optimizer.state_dict()))
