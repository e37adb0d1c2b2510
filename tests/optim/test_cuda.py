"""The same steps on a CUDA device as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.linalg import orthogonalize
from lightning_muon.optim import Muon
from lightning_muon.partition import MatrixLayout
from tests.optim import reference
from tests.optim.references import REFERENCES
from tests.optim.rule_cases import all_cases, run_package, run_reference
from tests.optim.subjects import HYBRID, MUON, Subject, advance, close, over_ours, reload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@over_ours
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
@pytest.mark.parametrize("options", [{}, {"cautious": True}, {"nesterov": False}], ids=str)
def test_same_steps_as_on_the_cpu(subject: Subject, lr: Any, options: dict[str, Any]) -> None:
    bag, optimizer = subject.pair(lr=lr, **options)
    twin = subject.bag().cuda()
    other = subject.build(twin, lr=lr, **options)
    advance(bag, optimizer, range(4))
    for seed in range(4):
        grads = subject.bag()
        advance(grads, subject.build(grads), range(seed, seed + 1))
        for param, source in zip(twin.parameters(), grads.parameters(), strict=True):
            param.grad = source.grad.cuda()
        other.step()
    for one, wanted in zip(twin.parameters(), bag.parameters(), strict=True):
        close(one.detach().cpu(), wanted.detach(), 1e-4)


@pytest.mark.parametrize(("rule", "number", "cautious"), all_cases())
def test_every_rule_follows_its_reference(rule: str, number: int, cautious: bool) -> None:
    expected = run_reference(rule, number, cautious)
    ours = run_package(rule, number, cautious, torch.float64, device="cuda")
    tolerance = max(1e-8, REFERENCES[rule].cases[number].float64)
    for name, wanted in expected.end.items():
        moved = (wanted - expected.start[name]).norm()
        assert (ours.end[name] - wanted).norm() <= tolerance * moved, name


@pytest.mark.parametrize("method", reference.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize(method: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 16, 40)
    out = orthogonalize(x.cuda(), method=method, dtype=dtype)
    wanted = torch.stack([reference.orthogonalize(matrix, method) for matrix in x])
    close(out.cpu().double(), wanted, 1e-3 if dtype == torch.float32 else 0.05)


def test_checkpoint_of_the_gpu_resumes_on_the_cpu() -> None:
    bag = HYBRID.bag().cuda()
    optimizer = HYBRID.build(bag)
    for _ in range(2):
        for param in bag.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    twin, other = HYBRID.pair()
    other.load_state_dict(reload(optimizer.state_dict()))
    advance(twin, other, range(1))
    assert all(param.isfinite().all() for param in twin.parameters())
    assert other.state[twin.w0]["momentum_buffer"].device.type == "cpu"


def test_parameters_on_two_devices_in_one_group() -> None:
    first, second = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4, device="cuda"))
    optimizer = Muon([first, second], nonfinite="skip")
    first.grad, second.grad = torch.randn(6, 4), torch.randn(6, 4, device="cuda")
    optimizer.step()
    assert first.isfinite().all()
    assert second.isfinite().all()


def test_state_follows_a_module_that_moves() -> None:
    bag, optimizer = MUON.pair()
    advance(bag, optimizer, range(2))
    bag.cuda()
    for param in bag.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[bag.w0]["momentum_buffer"].device.type == "cuda"


def test_layouts() -> None:
    for shape, layout in (((12, 5), MatrixLayout(split=(6, 4, 2))), ((4, 6, 3, 2), MatrixLayout(transposed=True))):
        value, grad = torch.randn(shape), torch.randn(shape)
        results = []
        for device in ("cpu", "cuda"):
            param = nn.Parameter(value.to(device))
            optimizer = Muon([{"params": [param], "layouts": [layout]}], lr=0.1, orthogonalize_dtype="float32")
            param.grad = grad.to(device)
            optimizer.step()
            results.append(param.detach().cpu())
        close(*results, 1e-4)
