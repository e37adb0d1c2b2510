"""The optimizers that the contract is asked of, on the same bag of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_muon.optim import HybridOptimizer, Muon

MATRIX_SHAPES = ((6, 4), (4, 6), (5, 5), (6, 4))
VECTOR_SHAPES = ((5,), (7,), (3, 4))
EPS = 1e-6  # AdamW's own 1e-8 is 0 in float16


class Bag(nn.Module):
    """Parameters ``w0, w1, ...`` (matrices) and, where the optimizer takes them, ``v0, v1, ...`` (anything else)."""

    def __init__(
        self,
        matrices: Sequence[tuple[int, ...]] = MATRIX_SHAPES,
        vectors: Sequence[tuple[int, ...]] = (),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for letter, shapes in (("w", matrices), ("v", vectors)):
            for index, shape in enumerate(shapes):
                value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                self.register_parameter(f"{letter}{index}", nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        """A loss that reaches every parameter, with gradients of full rank."""
        loss = x.new_zeros((), dtype=torch.float32)
        for index, param in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(97 * index)
            target = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param)
            loss = loss + ((param - target * x.to(param)) ** 2).sum().float()
        return loss

    def named(self, letter: str) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.named_parameters() if name.startswith(letter)]

    def values(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.parameters()]


@dataclass(frozen=True)
class Subject:
    """One optimizer under test."""

    name: str
    vectors: tuple[tuple[int, ...], ...]
    make: Callable[..., Optimizer]

    def bag(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Bag:
        return Bag(vectors=self.vectors, dtype=dtype, seed=seed)

    def build(self, bag: Bag, **options: Any) -> Optimizer:
        return self.make(bag, **options)

    def pair(self, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Bag, Optimizer]:
        bag = self.bag(dtype)
        return bag, self.build(bag, **options)


def _muon(bag: Bag, lr: Any = 0.02, weight_decay: float = 0.1, **options: Any) -> Optimizer:
    return Muon(bag.named("w"), lr=lr, weight_decay=weight_decay, **{"orthogonalize_dtype": "float32", **options})


def _hybrid(bag: Bag, lr: Any = 0.02, weight_decay: float = 0.1, **options: Any) -> Optimizer:
    other_lr = lr.clone() if isinstance(lr, Tensor) else lr
    other = AdamW(bag.named("v"), lr=other_lr, weight_decay=weight_decay, eps=EPS)
    return HybridOptimizer({"other": other, "matrix": _muon(bag, lr, weight_decay, **options)})


def _adamw(bag: Bag, lr: Any = 0.02, weight_decay: float = 0.1, **options: Any) -> Optimizer:
    options = {
        key: value for key, value in options.items() if key not in ("momentum", "nesterov", "nonfinite", "state_dtype")
    }
    return AdamW(list(bag.named_parameters()), lr=lr, weight_decay=weight_decay, eps=EPS, **options)


MUON = Subject("muon", (), _muon)
HYBRID = Subject("hybrid", VECTOR_SHAPES, _hybrid)
ADAMW = Subject("adamw", VECTOR_SHAPES, _adamw)
OURS = (MUON, HYBRID)
ALL = (MUON, HYBRID, ADAMW)  # torch's own AdamW shows that a test asks for no more than torch gives

over_all = pytest.mark.parametrize("subject", ALL, ids=lambda subject: subject.name)
over_ours = pytest.mark.parametrize("subject", OURS, ids=lambda subject: subject.name)
over_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).split(".")[1]
)


def set_grads(bag: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in bag.parameters():
        param.grad = (torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale).to(param.dtype)


def advance(bag: nn.Module, optimizer: Optimizer, steps: Sequence[int] | range) -> None:
    """One step of reproducible gradients for each number in ``steps``."""
    for seed in steps:
        set_grads(bag, seed)
        optimizer.step()


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Copies of all tensors in the state, in the order of the param groups."""
    return [
        value.detach().clone()
        for group in optimizer.param_groups
        for param in group["params"]
        for _, value in sorted(optimizer.state.get(param, {}).items())
        if isinstance(value, Tensor)
    ]


def snapshot(bag: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    return [param.detach().clone() for param in bag.parameters()] + state_tensors(optimizer)


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), f"largest difference {(one.double() - other.double()).abs().max():.3e}"


def reload(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as if it had been to disk and back."""
    return copy.deepcopy(state)


def trained(
    subject: Subject, dtype: torch.dtype = torch.float32, steps: int = 3, **options: Any
) -> tuple[Bag, Optimizer]:
    bag, optimizer = subject.pair(dtype, **options)
    advance(bag, optimizer, range(steps))
    return bag, optimizer


def fresh(subject: Subject, values_of: Bag, dtype: torch.dtype | None = None, **options: Any) -> tuple[Bag, Optimizer]:
    """A new process: another model with the same weights, another optimizer without state."""
    bag = subject.bag(dtype or values_of.w0.dtype, seed=5)
    for param, value in zip(bag.parameters(), values_of.parameters(), strict=True):
        param.data.copy_(value.data)
    return bag, subject.build(bag, **options)


def assert_go_on_alike(
    first: tuple[Bag, Optimizer], second: tuple[Bag, Optimizer], steps: range = range(10, 13)
) -> None:
    assert_same_bits(snapshot(*first), snapshot(*second))
    advance(*first, steps)
    advance(*second, steps)
    assert_same_bits(snapshot(*first), snapshot(*second))


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)
