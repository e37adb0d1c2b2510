"""MuonHyperball: what its equations promise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_muon.optim import MuonHyperball
from lightning_muon.partition import MatrixLayout
from tests.optim.reference import orthogonalize
from tests.optim.rule_cases import normal, rotation
from tests.optim.rule_walk import relative, walk

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@over_shapes
@pytest.mark.parametrize("radius", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_constant(shape: tuple[int, int], radius: float | None, dtype: torch.dtype) -> None:
    """That of the first weights, or the given one, from the first step on: rounding does not add up."""
    weight = normal(*shape, seed=1)[0].to(dtype)
    run = walk(MuonHyperball, weight, normal(*shape, 100), lr=0.1, weight_decay=0.5, radius=radius)
    wanted = float(weight.norm()) if radius is None else radius
    for moved in run.weights[1:]:
        assert float(moved.double().norm()) == pytest.approx(wanted, rel=3e-6 if dtype == torch.float32 else 1e-12)


@over_shapes
def test_closed_form_of_a_step(shape: tuple[int, int]) -> None:
    (weight,), (grad,) = normal(*shape, seed=1), normal(*shape)
    run = walk(MuonHyperball, weight, [grad], lr=0.3)
    direction = orthogonalize(grad)
    aim = weight - 0.3 * weight.norm() * direction / direction.norm()
    assert relative(run.weights[-1], weight.norm() * aim / aim.norm()) < 1e-12


@over_shapes
def test_learning_rate_is_the_relative_change(shape: tuple[int, int]) -> None:
    """Up to the part of the step that is along the weights, which the norm takes back."""
    (weight,), (grad,) = normal(*shape, seed=1), normal(*shape)
    grad -= (grad * weight).sum() / weight.square().sum() * weight
    for size in (0.01, 1.0, 100.0):
        run = walk(MuonHyperball, weight * size, [grad], lr=1e-4)
        assert 0.8e-4 < relative(run.weights[1], run.weights[0]) <= 1.0001e-4


def test_size_of_weights_and_gradients_does_not_matter() -> None:
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 4)
    plain = walk(MuonHyperball, weight, grads)
    scaled = walk(MuonHyperball, weight * 100, [grad * 1e-3 for grad in grads])
    assert relative(scaled.weights[-1], plain.weights[-1] * 100) < 1e-10


def test_weight_decay_only_lengthens_the_step() -> None:
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 4)
    decayed = walk(MuonHyperball, weight, grads, lr=0.1, weight_decay=2.0)
    longer = walk(MuonHyperball, weight, grads, lr=0.1 / (1 - 0.1 * 2.0))
    assert relative(decayed.weights[-1], longer.weights[-1]) < 1e-12


def test_rotated_problems_have_rotated_answers() -> None:
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 4)
    left, right = rotation(6), rotation(4, seed=8)
    plain = walk(MuonHyperball, weight, grads)
    turned = walk(MuonHyperball, left @ weight @ right, [left @ grad @ right for grad in grads])
    assert relative(turned.weights[-1], left @ plain.weights[-1] @ right) < 1e-9


def test_zero_weights_need_a_radius() -> None:
    params = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.zeros(4, 6))]
    for param in params:
        param.grad = torch.randn(4, 6)
    with pytest.raises(ValueError, match="radius"):
        MuonHyperball(params).step()
    assert torch.equal(params[0], torch.ones(4, 6)), "a refused step moves nothing"
    optimizer = MuonHyperball(params, radius=2.0)
    for _ in range(2):
        optimizer.step()
        for param in params:
            assert float(param.detach().norm()) == pytest.approx(2.0, rel=1e-5)


def test_experts_have_a_radius_each() -> None:
    weight = torch.stack([matrix * size for matrix, size in zip(normal(4, 6, 3), (1.0, 5.0, 0.1), strict=True)])
    param = nn.Parameter(weight.clone())
    optimizer = MuonHyperball([{"params": [param], "layouts": [MatrixLayout(batch_dims=1)]}], lr=0.1)
    for seed in range(3):
        param.grad = torch.stack(normal(4, 6, 3, seed=seed))
        optimizer.step()
    torch.testing.assert_close(torch.linalg.matrix_norm(param.detach()), torch.linalg.matrix_norm(weight))


def test_the_radius_comes_back_with_a_checkpoint() -> None:
    """A run that goes on from drifted or averaged weights returns to the norm it began with."""
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 4)
    run = walk(MuonHyperball, weight, grads[:2])
    other = walk(MuonHyperball, run.weights[-1] * 1.1)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.step(grads[2])
    assert float(other.weights[-1].norm()) == pytest.approx(float(weight.norm()), rel=1e-10)


@pytest.mark.parametrize("radius", [None, 2.0])
def test_without_a_step_nothing_changes(radius: float | None) -> None:
    """A zero gradient and a learning rate of 0 leave every bit, also of weights that are not on the sphere yet."""
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 2)
    still = walk(MuonHyperball, weight, [torch.zeros(6, 4)], weight_decay=0.5, radius=radius)
    assert torch.equal(still.weights[-1], weight)
    assert torch.equal(walk(MuonHyperball, weight, grads, lr=0.0, weight_decay=0.5, radius=radius).weights[-1], weight)


def test_steps_as_long_as_the_weights() -> None:
    """A learning rate of 1; and where the step leads to zero, which has no direction, nothing breaks."""
    (weight,), (grad,) = normal(6, 4, seed=1), normal(6, 4)
    run = walk(MuonHyperball, weight, [grad], lr=1.0)
    assert relative(run.weights[-1], weight) > 0.1
    assert float(run.weights[-1].norm()) == pytest.approx(float(weight.norm()), rel=1e-12)
    eye = torch.eye(2, dtype=torch.float64)
    assert torch.isfinite(walk(MuonHyperball, eye, [eye] * 2, lr=1.0, momentum=0.0).weights[-1]).all()
