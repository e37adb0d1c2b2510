"""NAMO and NAMO-D: what their equations promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import NAMO, NAMOD, Muon
from tests.optim.reference import polar
from tests.optim.rule_cases import normal, rotation
from tests.optim.rule_walk import relative, walk

EXACT = {"method": "svd", "eps": 1e-30, "lr": 1e-3}
SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_rules = pytest.mark.parametrize("rule", [NAMO, NAMOD], ids=["NAMO", "NAMOD"])


def test_neither_is_the_other() -> None:
    """isinstance tells them apart."""
    (weight,) = normal(6, 4)
    assert not isinstance(walk(NAMOD, weight).optimizer, NAMO)
    assert not isinstance(walk(NAMO, weight).optimizer, NAMOD)


@over_shapes
@over_rules
def test_a_constant_gradient_makes_it_muon(rule: type, shape: tuple[int, int]) -> None:
    (weight,), (grad,) = normal(*shape, seed=1), normal(*shape)
    run = walk(rule, weight, [grad] * 6, eps=1e-30, lr=0.01, weight_decay=0.3)
    muon = walk(Muon, weight, [grad] * 6, lr=0.01, weight_decay=0.3, nesterov=False)
    assert relative(run.weights[-1], muon.weights[-1]) < 1e-12
    for state in run.states:
        torch.testing.assert_close(state["adaptation"], torch.ones_like(state["adaptation"]), rtol=1e-10, atol=0)


def test_nesterov_begins_with_longer_steps() -> None:
    """(1 - mu^(t + 1)) / (1 - mu^t) for a constant gradient."""
    (weight,), (grad,) = normal(6, 4, seed=1), normal(6, 4)
    run = walk(NAMO, weight, [grad] * 5, nesterov=True, **EXACT)
    found = [float(state["adaptation"]) for state in run.states]
    assert found == pytest.approx([(1 - 0.95 ** (t + 1)) / (1 - 0.95**t) for t in range(1, 6)], rel=1e-9)
    assert found[:3] == pytest.approx([1.95, 1.46, 1.30], abs=0.01)


def test_adaptation_is_bounded_by_cauchy_and_schwarz() -> None:
    """Whatever the gradients; growing ones in one direction come near the bound."""
    mu, mu2 = 0.95, 0.99
    bound = (1 - mu) / math.sqrt((1 - mu2) * (1 - mu**2 / mu2))
    (weight,), (grad,) = normal(4, 6, seed=1), normal(4, 6)
    wild = [noise * 10.0 ** (3 * math.sin(t)) for t, noise in enumerate(normal(4, 6, 60))]
    worst = [grad * (mu / mu2) ** -t for t in range(200)]
    for grads in (wild, worst):
        for t, state in enumerate(walk(NAMO, weight, grads, **EXACT).states, 1):
            assert float(state["adaptation"]) <= bound * math.sqrt(1 - mu2**t) / (1 - mu**t) * (1 + 1e-9)
    last = float(walk(NAMO, weight, worst, **EXACT).states[-1]["adaptation"])
    assert last == pytest.approx(bound * math.sqrt(1 - mu2**200) / (1 - mu**200), rel=0.02)


def test_noise_shrinks_the_steps() -> None:
    (weight,) = normal(20, 20, seed=1)
    run = walk(NAMO, weight, normal(20, 20, 300), lr=1e-3)
    assert float(run.states[-1]["adaptation"]) == pytest.approx(math.sqrt(0.05 / 1.95), rel=0.15)


@over_rules
def test_weight_decay_is_adapted_as_the_step_is(rule: type) -> None:
    """Rows without a gradient do not step: what they lose is the decay."""
    (weight,) = normal(6, 4, seed=1)
    grads = [torch.cat([grad[:1], torch.zeros(5, 4, dtype=torch.float64)]) for grad in normal(6, 4, 4)]
    run = walk(rule, weight, grads, method="svd", lr=0.02, weight_decay=0.5)
    wanted = weight[1:]
    for state in run.states:
        assert not torch.allclose(state["adaptation"], torch.ones_like(state["adaptation"])) or state["step"] == 1
        wanted = wanted * (1 - 0.02 * 0.5 * state["adaptation"].view(1, -1))
    assert relative(run.weights[-1][1:], wanted) < 1e-12


@over_shapes
def test_singular_values_of_the_step(shape: tuple[int, int]) -> None:
    """NAMO keeps those of the polar factor equal; NAMO-D scales columns, which does not."""
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 4)
    run = walk(NAMO, weight, grads, weight_decay=0.0, **EXACT)
    values = torch.linalg.svdvals(run.moves[-1])
    length = 1e-3 * 0.2 * math.sqrt(max(shape)) * float(run.states[-1]["adaptation"])
    torch.testing.assert_close(values, torch.full_like(values, length), rtol=1e-9, atol=0)
    columns = torch.linalg.svdvals(walk(NAMOD, weight, grads, weight_decay=0.0, clamp=0.1, **EXACT).moves[-1])
    assert float(columns.max() / columns.min()) > 1.001


@over_shapes
def test_columns_are_scaled_by_the_state(shape: tuple[int, int]) -> None:
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 4)
    run = walk(NAMOD, weight, grads, weight_decay=0.0, clamp=0.1, **EXACT)
    for move, state in zip(run.moves, run.states, strict=True):
        wanted = polar(state["momentum_buffer"]) * state["adaptation"].view(1, -1)
        assert relative(move, 1e-3 * 0.2 * math.sqrt(max(shape)) * wanted) < 1e-9


@over_shapes
def test_columns_with_one_factor_move_along_the_polar_factor(shape: tuple[int, int]) -> None:
    """clamp = 1; and at the first step, where all columns agree, whatever clamp is."""
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 4)
    run = walk(NAMOD, weight, grads, weight_decay=0.0, clamp=1.0, **EXACT)
    for move, state in zip(run.moves, run.states, strict=True):
        wanted = polar(state["momentum_buffer"])
        assert relative(move / move.norm(), wanted / wanted.norm()) < 1e-9
    first = walk(NAMOD, weight, grads[:1], weight_decay=0.0, clamp=0.1, **EXACT).states[0]["adaptation"]
    torch.testing.assert_close(first, torch.ones_like(first), rtol=1e-9, atol=0)


@pytest.mark.parametrize("clamp", [0.5, 0.9])
def test_columns_stay_near_their_mean(clamp: float) -> None:
    """Within c and 1 / c of their mean. One column's gradient turns about at each step, another's stays."""
    (weight,), (steady,), grads = normal(8, 6, seed=1), normal(8, 6, seed=2), normal(8, 6, 20)
    for t, grad in enumerate(grads):
        grad[:, 0], grad[:, 3] = steady[:, 0] * (-1) ** t, steady[:, 3]
    clamped = walk(NAMOD, weight, grads, clamp=clamp, **EXACT).states
    free = walk(NAMOD, weight, grads, clamp=1e-9, **EXACT).states
    for state, wild in zip(clamped, free, strict=True):
        mean = float(wild["adaptation"].mean())
        wanted = wild["adaptation"].clamp(min=clamp * mean, max=mean / clamp)
        torch.testing.assert_close(state["adaptation"], wanted, rtol=1e-9, atol=0)
    assert float(free[-1]["adaptation"].max() / free[-1]["adaptation"].min()) > clamp**-2


def test_columns_without_a_gradient() -> None:
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 3)
    for grad in grads:
        grad[:, 2] = 0.0
    run = walk(NAMOD, weight, grads, lr=0.02)
    assert torch.isfinite(run.weights[-1]).all()
    decayed = run.weights[-1][:, 2] / weight[:, 2]
    torch.testing.assert_close(decayed, decayed[:1].expand(6), rtol=1e-6, atol=0)


@over_shapes
def test_equivariance(shape: tuple[int, int]) -> None:
    """NAMO does not know the basis of either side, NAMO-D not that of the rows."""
    grads = normal(*shape, 4)
    zero = torch.zeros(shape, dtype=torch.float64)
    left, right = rotation(shape[0]), rotation(shape[1], seed=8)

    def last(rule: type, turn: Tensor, turn_right: Tensor) -> Tensor:
        turned = [turn @ grad @ turn_right for grad in grads]
        return walk(rule, zero, turned, weight_decay=0.0, **EXACT).weights[-1]

    eye_left, eye_right = (torch.eye(size, dtype=torch.float64) for size in shape)
    assert relative(last(NAMO, left, right), left @ last(NAMO, eye_left, eye_right) @ right) < 1e-9
    plain = last(NAMOD, eye_left, eye_right)
    assert relative(last(NAMOD, left, eye_right), left @ plain) < 1e-9
    assert relative(last(NAMOD, eye_left, right), plain @ right) > 1e-4


@over_rules
def test_steps_and_decay_are_capped(rule: type) -> None:
    """However large the learning rate, a singular value moves by 1 at most, and a weight is not decayed below 0."""
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 3)
    for move, state in zip(*_moves_and_states(rule, weight, grads, 0.0), strict=True):
        assert relative(move, polar(state["momentum_buffer"])) < 1e-9
    run = walk(rule, weight, grads[:1], method="svd", lr=100.0, weight_decay=1.0)
    assert relative(run.weights[-1], -polar(grads[0])) < 1e-9


def _moves_and_states(rule: type, weight: Tensor, grads: list[Tensor], decay: float) -> tuple[list, list]:
    run = walk(rule, weight, grads, method="svd", lr=100.0, weight_decay=decay)
    return run.moves, run.states


@over_rules
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_size_of_the_gradients_does_not_matter(rule: type, size: float) -> None:
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 4)
    plain = walk(rule, weight, grads, **EXACT)
    scaled = walk(rule, weight, [grad * size for grad in grads], **EXACT)
    assert relative(scaled.weights[-1], plain.weights[-1]) < 1e-12


@over_rules
def test_state_is_small(rule: type) -> None:
    (weight,) = normal(6, 4)
    run = walk(rule, weight.float(), normal(6, 4, 1))
    numbers = 1 if rule is NAMO else 4
    sizes = {key: value.numel() for key, value in run.states[0].items()}
    assert sizes == {"momentum_buffer": 24, "second_moment": numbers, "adaptation": numbers, "step": 1}
