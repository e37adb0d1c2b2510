"""Muon equals torch.optim.Muon."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import Muon

SHAPES = {"m>n": (24, 10), "m<n": (10, 24), "m=n": (16, 16)}


def run(kind: type, weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    param = nn.Parameter(weight.clone())
    optimizer = kind([param], **options)
    for k, grad in enumerate(grads):
        optimizer.param_groups[0]["lr"] = options["lr"] * (1 + 0.5 * k)
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon then orthogonalizes in the dtype of the gradient."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)


@pytest.mark.parametrize(
    ("weight_decay", "nesterov", "dtype"), [(0.1, True, torch.float64), (0.0, False, torch.float32)], ids=str
)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_products_in_full_precision(
    shape: tuple[int, int], adjust: str, weight_decay: float, nesterov: bool, dtype: torch.dtype, without_bfloat16: None
) -> None:
    weight = torch.randn(shape, dtype=dtype)
    grads = [torch.randn(shape, dtype=dtype) for _ in range(5)]
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": weight_decay, "momentum": 0.95, "nesterov": nesterov}
    theirs = run(torch.optim.Muon, weight, grads, adjust_lr_fn=adjust, **options)
    ours = run(Muon, weight, grads, lr_scale=adjust, orthogonalize_dtype=dtype, **options)
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_as_it_is_in_bfloat16(shape: tuple[int, int], adjust: str) -> None:
    """torch rounds the norm to bfloat16, we divide in float32: each update may differ by what bfloat16 products do."""
    weight = torch.randn(shape)
    grads = [torch.randn(shape) for _ in range(5)]
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
    theirs = run(torch.optim.Muon, weight, grads, adjust_lr_fn=adjust, **options)
    ours = run(Muon, weight, grads, lr_scale=adjust, orthogonalize_dtype="bfloat16", **options)
    moved = (theirs - weight).norm()
    assert (ours - theirs).norm() <= 0.02 * moved
    assert (ours - theirs).norm() <= 0.01 * theirs.norm()


def test_same_defaults_as_torch() -> None:
    ours = Muon([nn.Parameter(torch.randn(4, 6))])
    theirs = torch.optim.Muon([nn.Parameter(torch.randn(4, 6))])
    for key in ("lr", "weight_decay", "momentum", "nesterov"):
        assert ours.defaults[key] == theirs.defaults[key]


def test_reads_the_state_of_torch_muon(without_bfloat16: None) -> None:
    """A checkpoint of torch.optim.Muon goes on under ours: the buffer has the same name, shape and meaning."""
    weight = torch.randn(10, 24)
    grads = [torch.randn(10, 24) for _ in range(6)]
    theirs, ours = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    first = torch.optim.Muon([theirs], lr=0.02, adjust_lr_fn="match_rms_adamw")
    for grad in grads[:3]:
        theirs.grad = grad.clone()
        first.step()
    second = Muon([ours], lr=0.02, orthogonalize_dtype="float32")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        ours.copy_(theirs)
    for grad in grads[3:]:
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)
