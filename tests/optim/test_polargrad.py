"""PolarGrad: what its equations promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import Muon, PolarGrad
from tests.optim.reference import orthogonalize, polar
from tests.optim.rule_cases import normal, rotation
from tests.optim.rule_walk import relative, walk

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_orders = pytest.mark.parametrize("order", ["momentum_first", "polar_first"])
over_exact_methods = pytest.mark.parametrize("method", ["svd", "qdwh"])


def nuclear(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix).sum()


@over_shapes
@over_exact_methods
def test_every_singular_value_moves_by_the_nuclear_norm(shape: tuple[int, int], method: str) -> None:
    (weight,) = normal(*shape, seed=1)
    run = walk(PolarGrad, weight, normal(*shape, 4), lr=0.01, method=method)
    for move, state in zip(run.moves, run.states, strict=True):
        norm = nuclear(state["momentum_buffer"])
        values = torch.linalg.svdvals(move)
        torch.testing.assert_close(values, (0.01 * norm).expand_as(values), rtol=1e-8, atol=0)
        assert float((state["momentum_buffer"] * move).sum()) == pytest.approx(0.01 * float(norm) ** 2, rel=1e-8)


@over_shapes
def test_is_muons_exact_step_times_the_nuclear_norm(shape: tuple[int, int]) -> None:
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 4)
    run = walk(PolarGrad, weight, grads)
    muon = walk(Muon, weight, grads, nesterov=False, method="svd", lr_scale="none")
    for update, wanted, state in zip(run.updates, muon.updates, run.states, strict=True):
        assert relative(update / nuclear(state["momentum_buffer"]), wanted) < 1e-8


@over_shapes
@over_orders
@pytest.mark.parametrize("size", [1e-8, 3.0, 1e8])
def test_steps_grow_with_the_gradients(shape: tuple[int, int], order: str, size: float) -> None:
    zero, grads = torch.zeros(shape, dtype=torch.float64), normal(*shape, 4)
    plain = walk(PolarGrad, zero, grads, order=order)
    scaled = walk(PolarGrad, zero, [grad * size for grad in grads], order=order)
    assert relative(scaled.weights[-1], plain.weights[-1] * size) < 1e-8


@over_exact_methods
def test_gradients_of_rank_one_make_it_gradient_descent_with_momentum(method: str) -> None:
    (weight,), (left,), (right,) = normal(6, 4, seed=1), normal(6, 1, seed=2), normal(4, 1, seed=3)
    direction = left @ right.T
    average, wanted = 0.0, weight
    run = walk(PolarGrad, weight, lr=0.1, method=method)
    for factor in (1.0, -0.3, 2.0, 0.5):
        run.step(factor * direction)
        average = 0.95 * average + 0.05 * factor
        wanted = wanted - 0.1 * average * direction
    assert relative(run.weights[-1], wanted) < 1e-6


def test_rank_deficient_gradients_leave_the_rest_alone() -> None:
    """The directions that are rounding error do not move."""
    left, right = rotation(9)[:, :2], rotation(6, seed=8)[:, :2]
    (weight,) = normal(9, 6, seed=1)
    run = walk(PolarGrad, weight, [left @ core @ right.T for core in normal(2, 2, 3)], lr=0.1)
    values = torch.linalg.svdvals(run.moves[-1])
    assert float(values[2] / values[1]) < 1e-8


@over_shapes
def test_polar_first_averages_polar_factors(shape: tuple[int, int]) -> None:
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 3)
    run = walk(PolarGrad, weight, grads, lr=0.01, order="polar_first", momentum=0.8)
    average = torch.zeros(shape, dtype=torch.float64)
    for grad, move, state in zip(grads, run.moves, run.states, strict=True):
        average = 0.8 * average + 0.2 * polar(grad)
        assert relative(state["momentum_buffer"], average) < 1e-8
        assert relative(move, 0.01 * nuclear(grad) * average) < 1e-8


@pytest.mark.parametrize("steps", [1, 2])
def test_a_rough_polar_factor_measures_the_gradient_by_itself(steps: int) -> None:
    """nu = <M, U>, not the nuclear norm, if U is not exact: as the authors ran it."""
    (grad,) = normal(8, 5)
    zero = torch.zeros(8, 5, dtype=torch.float64)
    (update,) = walk(PolarGrad, zero, [grad], method="jordan", steps=steps).updates
    factor = orthogonalize(grad, "jordan", steps)
    assert relative(update, 0.05 * (grad * factor).sum() * factor) < 1e-8
    (rough,) = walk(PolarGrad, zero, [grad], steps=steps).updates
    (exact,) = walk(PolarGrad, zero, [grad]).updates
    assert 0.01 < relative(rough, exact) < 1.0


def test_plain_weight_decay_and_float32() -> None:
    (weight,), grads = normal(12, 8, seed=1), normal(12, 8, 4)
    exact = walk(PolarGrad, weight, grads, method="svd", weight_decay=0.3)
    rounded = walk(PolarGrad, weight.float(), grads, weight_decay=0.3)
    assert relative(rounded.weights[-1], exact.weights[-1]) < 1e-5
    wanted = weight
    for update in exact.updates:
        wanted = wanted * (1 - 0.02 * 0.3) - 0.02 * update
    assert relative(exact.weights[-1], wanted) < 1e-12
