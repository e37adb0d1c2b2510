"""The torch.optim contract, part 1: what construction and add_param_group accept and refuse."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_muon.optim import HybridOptimizer, Muon
from lightning_muon.partition import MatrixLayout
from tests.optim.subjects import HYBRID, MUON, Bag, Subject, advance, over_all, over_ours


def matrix(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (4, 6)), **options))


def test_bare_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"iterable|iterator"):
        Muon(matrix())
    with pytest.raises((TypeError, ValueError)):
        HybridOptimizer(matrix())  # type: ignore[arg-type]


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Muon([])
    with pytest.raises(ValueError, match="optimizers"):
        HybridOptimizer({})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "-1.0"),
    ({"lr": math.nan}, "nan"),
    ({"lr": math.inf}, "inf"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr"),
    ({"lr": torch.tensor(-1.0)}, "-1.0"),
    ({"weight_decay": -0.1}, "-0.1"),
    ({"weight_decay": math.nan}, "nan"),
    ({"momentum": -0.1}, "-0.1"),
    ({"momentum": 1.0}, "1.0"),
    ({"momentum": 1.5}, "1.5"),
    ({"momentum": math.nan}, "nan"),
    ({"steps": 0}, "0"),
    ({"steps": -1}, "-1"),
    ({"steps": 100}, "100"),
    ({"steps": 2.5}, "2.5"),
    ({"method": "newton-schulz"}, "newton-schulz"),
    ({"lr_scale": "rms"}, "rms"),
    ({"orthogonalize_dtype": "int32"}, "int32"),
    ({"orthogonalize_dtype": "float31"}, "float31"),
    ({"orthogonalize_dtype": torch.int64}, "int64"),
    ({"state_dtype": "int8"}, "int8"),
    ({"state_dtype": "half precision"}, "half precision"),
    ({"nonfinite": "ignore"}, "ignore"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_bad_argument_is_refused_and_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        Muon([matrix()], **arguments)
    (argument,) = arguments
    assert argument.removeprefix("orthogonalize_").split("_")[0] in str(error.value)


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_bad_option_of_a_group_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        Muon([{"params": [matrix()], **arguments}])
    optimizer = Muon([matrix()])
    with pytest.raises(ValueError, match=re.escape(named)):
        optimizer.add_param_group({"params": [matrix()], **arguments})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", ["0.1", None, [0.1]])
@pytest.mark.parametrize("argument", ["lr", "weight_decay", "momentum"])
def test_argument_of_another_type_is_refused(argument: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Muon([matrix()], **{argument: value})


def test_float16_products_on_a_cpu_are_refused() -> None:
    """Fault 35: hundreds of times slower, so never by accident."""
    param = matrix()
    param.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match="float16"):
        Muon([param], orthogonalize_dtype="float16").step()


@pytest.mark.parametrize("zero", [{"lr": 0.0}, {"weight_decay": 0.0}, {"momentum": 0.0}, {"lr": 0}, {"lr": 1}])
def test_limits_are_allowed(zero: dict[str, Any]) -> None:
    param = matrix()
    optimizer = Muon([param], **zero)
    param.grad = torch.randn(4, 6)
    optimizer.step()


def test_duplicates_are_refused() -> None:
    param, other = matrix(), matrix()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # within a group torch warns
        with pytest.raises((ValueError, UserWarning), match="duplicate"):
            Muon([param, param])
    with pytest.raises(ValueError, match="more than one"):
        Muon([{"params": [param]}, {"params": [other, param]}])
    optimizer = Muon([param])
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [param]})
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        HybridOptimizer({"other": AdamW([param]), "matrix": Muon([param])})


def test_non_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match="non-leaf"):
        Muon([matrix() * 2])


@pytest.mark.parametrize("shape", [(), (5,), (8, 4, 3), (8, 4, 3, 3), (4, 3, 2, 2, 2)])
def test_other_ranks_need_a_layout(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        Muon([nn.Parameter(torch.randn(shape))])


def test_error_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"norm\.weight"):
        Muon([("linear.weight", matrix()), ("norm.weight", nn.Parameter(torch.randn(5)))])


@pytest.mark.parametrize("shape", [(8, 4, 3), (8, 4, 3, 3), (4, 3, 2, 2, 2)])
@pytest.mark.parametrize("layout", [MatrixLayout(), MatrixLayout(batch_dims=1), MatrixLayout(transposed=True)])
def test_other_ranks_work_with_a_layout(shape: tuple[int, ...], layout: MatrixLayout) -> None:
    param = nn.Parameter(torch.randn(shape))
    before = param.detach().clone()
    optimizer = Muon([{"params": [param], "layouts": [layout]}])
    param.grad = torch.randn(shape)
    optimizer.step()
    assert param.isfinite().all()
    assert (param != before).float().mean() > 0.9


@pytest.mark.parametrize("shape", [(), (5,)])
def test_vectors_are_refused_with_a_layout_too(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matri"):
        Muon([{"params": [nn.Parameter(torch.randn(shape))], "layouts": [MatrixLayout()]}])


def test_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q\.weight.*fan-out"):
        Muon([{"params": [("q.weight", matrix(10, 6))], "layouts": [MatrixLayout(split=(4, 4))]}])
    with pytest.raises(ValueError, match="layouts"):
        Muon([{"params": [matrix(), matrix()], "layouts": [MatrixLayout()]}])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameter_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError), match="complex"):
        Muon([nn.Parameter(torch.randn(4, 6, dtype=dtype))])


def test_integer_parameter_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="int64"):
        Muon([nn.Parameter(torch.ones(4, 6, dtype=torch.int64), requires_grad=False)])


@over_all
def test_repr_lists_the_groups(subject: Subject) -> None:
    _, optimizer = subject.pair()
    assert "lr: 0.02" in repr(optimizer)


@over_all
def test_groups_are_filled_from_the_defaults(subject: Subject) -> None:
    _, optimizer = subject.pair(lr=0.03)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.03
        assert group["weight_decay"] == 0.1
        assert "params" in group


def test_options_of_a_group_win_over_the_defaults() -> None:
    """Fault 20: the user's groups keep their own options through construction and step."""
    first, second = matrix(), matrix()
    optimizer = Muon(
        [{"params": [first], "lr": 0.0, "weight_decay": 0.0}, {"params": [second], "momentum": 0.5}], lr=0.1
    )
    before = first.detach().clone()
    first.grad, second.grad = torch.randn(4, 6), torch.ones(4, 6)
    optimizer.step()
    assert torch.equal(first, before)
    torch.testing.assert_close(optimizer.state[second]["momentum_buffer"], torch.full((4, 6), 0.5))


def test_add_param_group_gets_the_defaults_and_trains() -> None:
    bag, extra = MUON.bag(), matrix(7, 3)
    optimizer = MUON.build(bag, lr=0.03)
    advance(bag, optimizer, range(2))
    optimizer.add_param_group({"params": [("extra", extra)]})
    group = optimizer.param_groups[-1]
    assert set(group) >= set(optimizer.defaults)
    assert group["lr"] == 0.03
    before = extra.detach().clone()
    extra.grad = torch.randn(7, 3)
    advance(bag, optimizer, range(2))
    assert not torch.equal(extra, before)


def test_add_param_group_of_one_tensor() -> None:
    optimizer = Muon([matrix()])
    optimizer.add_param_group({"params": matrix(3, 5)})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_add_param_group_refuses_what_construction_refuses(shape: tuple[int, ...]) -> None:
    param = matrix()
    optimizer = Muon([param])
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(shape))]})
    with pytest.raises(TypeError):
        optimizer.add_param_group([nn.Parameter(torch.randn(shape))])  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1
    param.grad = torch.randn(4, 6)
    optimizer.step()


def test_add_param_group_with_layouts() -> None:
    optimizer = Muon([matrix()])
    conv = nn.Parameter(torch.randn(6, 2, 3, 3))
    optimizer.add_param_group({"params": [conv], "layouts": [MatrixLayout()]})
    before = conv.detach().clone()
    conv.grad = torch.randn(6, 2, 3, 3)
    optimizer.step()
    assert not torch.equal(conv, before)
    assert "layouts" not in optimizer.param_groups[-1]


@over_ours
def test_param_groups_hold_only_plain_values(subject: Subject) -> None:
    """Checkpoints are read with weights_only=True; so every option is a number, a string, a list of them or None."""

    def plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(plain(item) for item in value)
        return value is None or isinstance(value, (bool, int, float, str))

    _, optimizer = subject.pair(state_dtype=torch.float32, orthogonalize_dtype=torch.float32)
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            assert plain(value), f"{key}: {value!r}"


def test_parameter_names_are_kept() -> None:
    bag = Bag(vectors=HYBRID.vectors)
    for optimizer in (MUON.build(bag), HYBRID.build(bag)):
        named = {name for group in optimizer.param_groups for name in group["param_names"]}
        assert named >= {"w0", "w1", "w2", "w3"}
        restored = [name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]]
        assert set(restored) == named
