"""The rules against their float64 references: one bag of parameters that holds every kind of layout, 10 steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon import experimental, optim
from lightning_muon.optim import MatrixOptimizer
from lightning_muon.partition import MatrixLayout
from tests.optim.observed import by_name
from tests.optim.reference import Layout, matrix_indices
from tests.optim.references import REFERENCES
from tests.optim.references.common import LRS, Case

PLAIN = Layout()
SHAPES: dict[str, tuple[tuple[int, ...], Layout]] = {
    "wide": ((4, 9), PLAIN),
    "wide2": ((4, 9), PLAIN),  # in one stack with the other two, each with its own history
    "wide3": ((4, 9), PLAIN),
    "tall": ((11, 5), PLAIN),
    "square": ((6, 6), PLAIN),
    "experts": ((3, 5, 8), Layout(batch_dims=1)),
    "thirds": ((12, 5), Layout(split=(4, 4, 4))),
    "unequal": ((10, 6), Layout(split=(6, 4))),  # the first block is in one stack with "square"
    "conv": ((6, 3, 2, 2), PLAIN),
    "low_rank": ((8, 6), PLAIN),  # of rank 2, in the same two-dimensional column space at every step
}
MISSING = {0: ("wide2",), 3: ("wide", "square", "tall"), 4: ("wide3", "experts"), 7: ("wide2", "unequal")}
LOSSES = (2.0, 1.7, 1.9, 1.2, 1.1, 1.3, 0.8, 0.6, 0.7, 0.5)
# Weights as small as they are in a network: rounding them to float32 at each of 10 steps then costs 1e-6 of the way.
WEIGHT_SIZE = 0.3


@dataclass(frozen=True)
class Run:
    """Where parameters started and ended, and the state of each, by name."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    state: dict[str, Any]


BASES = {"MatrixOptimizer", "MomentumOptimizer", "OrthogonalizingOptimizer", "WeightAwareOptimizer"}

RULES: dict[str, type[MatrixOptimizer]] = {
    name: kind
    for name, kind in {**vars(optim), **vars(experimental)}.items()
    if isinstance(kind, type) and issubclass(kind, MatrixOptimizer) and name not in BASES
}
"""All rules that the package exports, by name."""


def rule_class(name: str) -> type[MatrixOptimizer]:
    """The package's class of this name."""
    return RULES[name]


def all_cases() -> list[Any]:
    """(rule, number of its case), with weight decay as it is and cautious."""
    return [
        pytest.param(
            name, number, cautious, id=f"{name}-{_describe(case)}{'-cautious' if cautious else ''}".replace("'", "")
        )
        for name, reference in REFERENCES.items()
        for number, case in enumerate(reference.cases)
        for cautious in (False, True)
    ]


def weights(case: Case) -> dict[str, Tensor]:
    """Float64 tensors that float32 holds exactly, so that both runs start from the same numbers."""
    generator = torch.Generator().manual_seed(case.seed)
    return {
        name: WEIGHT_SIZE * torch.randn(shape, generator=generator).double()
        for name, (shape, _) in SHAPES.items()
        if name not in case.without
    }


def gradients(case: Case, steps: int = len(LRS)) -> list[dict[str, Tensor | None]]:
    """A gradient for each parameter and step, or None. They too are exact in float32."""
    generator = torch.Generator().manual_seed(100 + case.seed)
    # Products of small integers: of rank 2 to the last bit, in every dtype.
    columns = torch.randint(1, 5, (8, 2), generator=generator).float()
    columns[:, 1] *= torch.tensor([1.0, -1.0] * 4)
    series = []
    for step in range(steps):
        grads: dict[str, Tensor | None] = {}
        for name, (shape, _) in SHAPES.items():
            grad = torch.randn(shape, generator=generator)
            if name == "low_rank":
                rows = torch.randint(1, 100, (2, 6), generator=generator) * grad[:2].sign()
                grad = columns @ rows / 64
            grads[name] = None if name in MISSING.get(step, ()) or name in case.without else grad.double()
        series.append(grads)
    return series


def package_options(name: str, case: Case, dtype: torch.dtype, cautious: bool, **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of the package's class for a run in one dtype."""
    options: dict[str, Any] = {"weight_decay": 0.1, **case.options, "cautious": cautious, **overrides}
    if "orthogonalize_dtype" in inspect.signature(rule_class(name)).parameters:
        options["orthogonalize_dtype"] = str(dtype).removeprefix("torch.")
    return options


def run_package(
    name: str,
    number: int,
    cautious: bool,
    dtype: torch.dtype,
    grads: Sequence[Mapping[str, Tensor | None]] = (),
    device: str = "cpu",
) -> Run:
    """The package's optimizer on the whole bag, with the case's own gradients if none are given."""
    case = REFERENCES[name].cases[number]
    start = weights(case)
    params = {key: nn.Parameter(value.to(device, dtype)) for key, value in start.items()}
    group = {"params": list(params.items()), "layouts": [package_layout(SHAPES[key][1]) for key in params]}
    optimizer = rule_class(name)([group], lr=case.lrs[0], **package_options(name, case, dtype, cautious))
    for lr, loss, step_grads in zip(case.lrs, LOSSES, grads or gradients(case), strict=False):
        optimizer.param_groups[0]["lr"] = lr
        for key, param in params.items():
            grad = step_grads[key]
            param.grad = None if grad is None else grad.to(device, dtype)
        optimizer.step(lambda loss=loss: loss)
    return Run(
        start,
        {key: param.detach().cpu().double() for key, param in params.items()},
        {key: dict(optimizer.state[param]) for key, param in params.items()},
    )


def run_reference(name: str, number: int, cautious: bool, grads: Sequence[Mapping[str, Tensor | None]] = ()) -> Run:
    """The reference, matrix by matrix. ``state`` holds a list of one dict a matrix for each parameter."""
    rule = REFERENCES[name]()
    case = rule.cases[number]
    defaults = {**rule.defaults, "weight_decay": 0.1, **case.options, "cautious": cautious}
    start = weights(case)
    end = {key: value.clone() for key, value in start.items()}
    indices = {key: matrix_indices(value.shape, SHAPES[key][1]) for key, value in start.items()}
    state: dict[str, list[dict[str, Tensor]]] = {key: [{} for _ in indices[key]] for key in start}
    for lr, loss, step_grads in zip(case.lrs, LOSSES, grads or gradients(case), strict=False):
        options = {**defaults, "lr": lr, "loss": loss}
        for key in start:
            grad = step_grads[key]
            if grad is None:
                continue
            flat = end[key].flatten()
            for index, matrix_state in zip(indices[key], state[key], strict=True):
                flat[index] = rule.step_matrix(flat[index], grad.flatten()[index], matrix_state, lr, options)
            end[key] = flat.reshape(end[key].shape)
    return Run(start, end, state)


def package_layout(layout: Layout) -> MatrixLayout:
    return MatrixLayout(layout.batch_dims, layout.groups, layout.transposed, layout.split, layout.repeats)


def package_state(run: Run, name: str, key: str, matrix: int, shape: torch.Size) -> Tensor:
    """The part of the package's state of a parameter that is one matrix's.

    Args:
        run: of the package.
        name: of the parameter.
        key: of the state.
        matrix: number of the matrix within the parameter.
        shape: that the reference's state of one matrix has.
    """
    state, layout = run.state[name], SHAPES[name][1]
    if key not in state and f"{key}.{matrix}" in state:  # fused blocks of unequal size: one entry a block
        tensor = state[f"{key}.{matrix}"]
        return tensor[0]
    tensor = state[key]
    param_shape = run.start[name].shape
    if tensor.shape == param_shape and len(shape) == 2:
        return tensor.flatten()[matrix_indices(param_shape, layout)[matrix]]
    return tensor[matrix]


def state_keys(state: dict[str, Any]) -> set[str]:
    """Names without the numbers of blocks, and without those of the reference's own."""
    return {key.split(".")[0] for key in state if not key.startswith("_")}


def updates(
    rule: type[MatrixOptimizer], grads: Sequence[Tensor], dtype: torch.dtype = torch.float64, **options: Any
) -> list[Tensor]:
    """What each step on one matrix subtracts at learning rate 1, without weight decay: scale times direction."""
    if "orthogonalize_dtype" in inspect.signature(rule).parameters:
        options = {"orthogonalize_dtype": dtype, **options}
    param = nn.Parameter(torch.zeros(grads[0].shape, dtype=dtype))
    optimizer = rule([param], lr=1.0, weight_decay=0.0, **options)
    seen: list[Tensor] = []
    optimizer.observe_updates(by_name(lambda name, update: seen.append(update)))
    for grad in grads:
        param.grad = grad.to(dtype)
        optimizer.step()
    return seen


def normal(m: int, n: int, count: int = 1, seed: int = 0) -> list[Tensor]:
    """Float64 matrices with independent normal entries."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(count)]


def rotation(size: int, seed: int = 7) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)[0]).Q


def signed_permutation(size: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)]


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest relative distance between two series of updates."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(first, second, strict=True))


def _describe(case: Case) -> str:
    return ",".join(f"{key}={value}" for key, value in case.options.items()) or "defaults"
