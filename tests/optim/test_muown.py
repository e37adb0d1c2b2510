"""Muown: what its equations promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import Muown
from tests.optim.reference import orthogonalize, shape_scale
from tests.optim.rule_cases import normal
from tests.optim.rule_walk import relative, walk

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def units(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True)


@over_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_as_long_as_their_magnitudes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    run = walk(Muown, normal(*shape, seed=1)[0].to(dtype), normal(*shape, 40), lr=0.02)
    for weight, state in zip(run.weights[1:], run.states, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(weight.norm(dim=1), state["magnitude"].flatten().abs(), rtol=tolerance, atol=0)


@over_shapes
def test_directions_do_not_learn_about_lengths(shape: tuple[int, int]) -> None:
    """The gradient of a direction is orthogonal to it: after one step it is what the momentum holds."""
    (weight,), (grad,) = normal(*shape, seed=1), normal(*shape)
    run = walk(Muown, weight, [grad])
    radial = (run.states[0]["momentum_buffer"] * weight).sum(dim=1)
    assert float(radial.abs().max()) < 1e-14
    tangential = 0.05 * (grad - (grad * units(weight)).sum(dim=1, keepdim=True) * units(weight))
    assert relative(run.states[0]["momentum_buffer"], tangential) < 1e-12


@over_shapes
@pytest.mark.parametrize("lr", [0.05, 1.0])
def test_closed_form_of_the_first_step(shape: tuple[int, int], lr: float) -> None:
    """Adam's first step is as long as the learning rate; the directions take Muon's of the tangential gradient."""
    (weight,), (grad,) = normal(*shape, seed=1), normal(*shape)
    run = walk(Muown, weight, [grad], lr=lr, weight_decay=0.4, eps=1e-30)
    radial = (grad * units(weight)).sum(dim=1, keepdim=True)
    magnitude = weight.norm(dim=1, keepdim=True) - lr * radial.sign()
    scale = shape_scale("match_rms_adamw", *shape)
    direction = weight - lr * scale * orthogonalize(grad - radial * units(weight))
    assert relative(run.weights[1], magnitude * units(direction) - lr * 0.4 * weight) < 1e-10


def test_directions_look_ahead() -> None:
    """By default, as the authors' code has it: with nesterov the second step weighs the newest gradient more."""
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 2)
    options = {"lr": 0.1, "weight_decay": 0.0}
    default, ahead, plain = (
        walk(Muown, weight, grads, **options, **more) for more in ({}, {"nesterov": True}, {"nesterov": False})
    )
    assert torch.equal(default.weights[2], ahead.weights[2])
    assert relative(default.weights[1], plain.weights[1]) < 1e-10  # a first gradient is not weighed against others
    assert relative(default.weights[2], plain.weights[2]) > 0.01


def test_runs_saved_before_the_look_ahead_go_on_without_it() -> None:
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 4)
    whole = walk(Muown, weight, grads, nesterov=False)
    half = walk(Muown, weight, grads[:2], nesterov=False)
    saved = half.optimizer.state_dict()
    del saved["param_groups"][0]["nesterov"]
    resumed = walk(Muown, half.weights[-1])
    resumed.optimizer.load_state_dict(saved)
    for grad in grads[2:]:
        resumed.step(grad)
    assert torch.equal(resumed.weights[-1], whole.weights[-1])


def test_decay_acts_on_the_weights() -> None:
    """Magnitudes are then the lengths of the decayed rows, while what turns the directions has not decayed."""
    (weight,), (grad,) = normal(6, 4, seed=1), normal(6, 4)
    plain = walk(Muown, weight, [grad], lr=0.1, weight_decay=0.0)
    decayed = walk(Muown, weight, [grad], lr=0.1, weight_decay=2.0)
    assert relative(plain.weights[1] - decayed.weights[1], 0.1 * 2.0 * weight) < 1e-12
    assert relative(decayed.states[0]["magnitude"].flatten(), decayed.weights[1].norm(dim=1)) < 1e-12
    assert torch.equal(decayed.states[0]["direction_norm"], plain.states[0]["direction_norm"])
    assert torch.equal(decayed.states[0]["momentum_buffer"], plain.states[0]["momentum_buffer"])


def test_magnitudes_that_crossed_zero_keep_their_sign_when_weights_decay() -> None:
    """Otherwise a row would turn against its momentum."""
    (weight,) = normal(6, 4, seed=1)
    weight = 0.05 * units(weight)
    run = walk(Muown, weight, [weight] * 3, lr=0.04, weight_decay=0.1, eps=1e-30, method="svd")
    assert [float(state["magnitude"].max()) > 0 for state in run.states] == [True, False, False]
    for moved, state in zip(run.weights[1:], run.states, strict=True):
        torch.testing.assert_close(moved.norm(dim=1), state["magnitude"].flatten().abs(), rtol=1e-10, atol=0)


def test_radial_gradients_change_magnitudes_alone() -> None:
    (weight,) = normal(6, 4, seed=1)
    lengths = torch.tensor([[1.0], [-2.0], [0.5], [3.0], [-1.0], [0.1]], dtype=torch.float64)
    run = walk(Muown, weight, [lengths * weight], lr=0.01, weight_decay=0.0, method="svd", momentum=0.0)
    # The tangential part is rounding error, but its polar factor need not be: so tell by the magnitudes.
    wanted = weight.norm(dim=1) - 0.01 * lengths.flatten().sign()
    torch.testing.assert_close(run.states[0]["magnitude"].flatten(), wanted, rtol=1e-6, atol=0)


def test_cautious_decay_spares_weights_that_grow() -> None:
    (weight,), (grad,) = normal(6, 4, seed=1), normal(6, 4)
    plain = walk(Muown, weight, [grad], lr=0.1, weight_decay=0.0)
    run = walk(Muown, weight, [grad], lr=0.1, weight_decay=1.0, cautious=True)
    shrinks = (plain.moves[0] * weight > 0).double()
    assert 0 < int(shrinks.sum()) < 24
    assert relative(run.weights[1], plain.weights[1] - 0.1 * shrinks * weight) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_learn(dtype: torch.dtype) -> None:
    """They are finite, and begin to move with the others."""
    weight = normal(6, 4, seed=1)[0].to(dtype)
    weight[2] = 0.0
    run = walk(Muown, weight, normal(6, 4, 30), lr=0.01, weight_decay=0.0, orthogonalize_dtype="float32")
    assert all(torch.isfinite(moved).all() for moved in run.weights)
    assert float(run.weights[-1][2].float().norm()) > 1e-3


@pytest.mark.parametrize("factor", [3.0, 1.005])
def test_weights_changed_from_outside_count_as_they_are(factor: float) -> None:
    """By loading others, or as little as averaging does."""
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 3)
    run = walk(Muown, weight.float(), grads[:2], lr=1e-6, weight_decay=0.0)
    with torch.no_grad():
        run.param.mul_(factor)
    run.step(grads[2])
    assert relative(run.weights[-1], factor * weight.float()) < 1e-4


def test_state_is_muons_and_four_numbers_a_row() -> None:
    run = walk(Muown, normal(6, 4)[0].float(), normal(6, 4, 1))
    sizes = {key: value.numel() for key, value in run.states[0].items()}
    rows = dict.fromkeys(("magnitude", "direction_norm", "magnitude_exp_avg", "magnitude_exp_avg_sq"), 6)
    assert sizes == {"momentum_buffer": 24, "step": 1, **rows}


def test_magnitudes_of_bfloat16_weights_gather_small_changes() -> None:
    """A change of length too small for the weights' dtype is not lost."""
    param = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = Muown([param], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        param.grad = torch.ones_like(param)
        optimizer.step()
    torch.testing.assert_close(param.detach().float().norm(dim=1), torch.full((4,), 1.98), rtol=4e-3, atol=0)
