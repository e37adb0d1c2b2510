"""Dion2: what its equations promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import Dion2, Muon
from tests.optim.reference import orthogonalize, shape_scale
from tests.optim.rule_cases import normal
from tests.optim.rule_walk import relative, walk

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def slices(matrix: Tensor) -> Tensor:
    """Along the shorter dimension, one a row."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def moved(matrix: Tensor) -> Tensor:
    return slices(matrix).abs().sum(dim=1) > 0


@over_shapes
@pytest.mark.parametrize("method", ["jordan", "svd"])
def test_all_slices_make_it_muon_without_looking_ahead(shape: tuple[int, int], method: str) -> None:
    """The buffer of a heavy ball, decayed after use, points where the average points; decay is the same."""
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 6)
    run = walk(Dion2, weight, grads, lr=0.02, weight_decay=0.3, momentum=0.9, fraction=1.0, method=method)
    muon = walk(Muon, weight, grads, lr=0.02, weight_decay=0.3, momentum=0.9, nesterov=False, method=method)
    assert relative(run.weights[-1], muon.weights[-1]) < 1e-10
    buffer = muon.states[-1]["momentum_buffer"] / (1 - 0.9)
    assert relative(run.states[-1]["momentum_buffer"], 0.9 * buffer) < 1e-10


@over_shapes
@pytest.mark.parametrize(("fraction", "counts"), [(0.25, (2, 2, 2)), (0.5, (3, 3, 4)), (0.01, (1, 1, 1))])
def test_number_of_slices(shape: tuple[int, int], fraction: float, counts: tuple[int, ...]) -> None:
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 5)
    count = dict(zip(SHAPES.values(), counts, strict=True))[shape]
    assert count == max(1, math.ceil(fraction * min(shape)))
    for update in walk(Dion2, weight, grads, fraction=fraction).updates:
        assert int(moved(update).sum()) == count


@over_shapes
def test_slices_that_are_not_chosen_stay_and_gather(shape: tuple[int, int]) -> None:
    """They do not move (but decay), and their gradients add up until they are used; what is used shrinks."""
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 8)
    run = walk(Dion2, weight, grads, lr=0.02, weight_decay=0.5, momentum=0.7, fraction=0.4)
    buffer = torch.zeros(shape, dtype=torch.float64)
    used = torch.zeros(min(shape), dtype=torch.bool)
    for grad, old, new, update, state in zip(
        grads, run.weights, run.weights[1:], run.updates, run.states, strict=False
    ):
        buffer = buffer + grad
        chosen = moved(update)
        used |= chosen
        assert relative(slices(new)[~chosen], (1 - 0.02 * 0.5) * slices(old)[~chosen]) < 1e-12
        slices(buffer)[chosen] *= 0.7
        assert relative(state["momentum_buffer"], buffer) < 1e-12
    assert used.all(), "what waits long enough is used"


@over_shapes
def test_the_largest_slices_are_orthogonalized_by_themselves(shape: tuple[int, int]) -> None:
    (weight,), (grad,) = normal(*shape, seed=1), normal(*shape)
    (update,) = walk(Dion2, weight, [grad], fraction=0.4).updates
    count = math.ceil(0.4 * min(shape))
    largest = slices(grad).abs().sum(dim=1).argsort(descending=True)[:count].sort().values
    assert torch.equal(moved(update).nonzero().flatten(), largest)
    wanted = shape_scale("match_rms_adamw", *shape) * orthogonalize(slices(grad)[largest])
    assert relative(slices(update)[largest], wanted) < 1e-10


def test_size_is_the_sum_of_absolute_values() -> None:
    """A row with one large entry is longer, but not larger, than one with many."""
    grad = torch.zeros(4, 16)
    grad[0, 0] = 5.0
    grad[2] = 0.5
    (update,) = walk(Dion2, torch.ones(4, 16), [grad]).updates
    assert moved(update).tolist() == [False, False, True, False]


def test_equal_slices_are_told_apart() -> None:
    """No more and no fewer than asked for."""
    (update,) = walk(Dion2, torch.ones(8, 16), [torch.eye(8, 16)], fraction=0.5).updates
    assert int(moved(update).sum()) == 4


def test_a_small_gradient_gets_its_turn() -> None:
    """Error feedback: a row ten times smaller is used now and then, and moves as far as the others then."""
    (weight,) = normal(4, 6, seed=1)
    sizes = torch.tensor([[1.0], [1.0], [1.0], [0.1]], dtype=torch.float64)
    (direction,) = normal(4, 6, seed=2)
    run = walk(Dion2, weight, [direction * sizes] * 200, momentum=0.5)
    turns = torch.stack([moved(update) for update in run.updates]).sum(dim=0)
    assert 1 <= int(turns[3]) <= 20
    assert int(turns[:3].min()) > 40
