"""SpectralSphere: what its equations promise."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import Muon, SpectralSphere
from tests.optim.rule_cases import normal, rotation
from tests.optim.rule_walk import relative, walk

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_searches = pytest.mark.parametrize("search", [True, False], ids=["search", "MuonSphere"])
EXACT: dict[str, Any] = {
    "tolerance": 1e-12,
    "power_iterations": 300,
    "search_steps": 80,
    "method": "svd",
    "steps": None,
}


def radius(shape: tuple[int, ...], c: float = 1.0) -> float:
    return c * math.sqrt(shape[0] / shape[1])


def on_the_sphere(shape: tuple[int, int], seed: int = 1, c: float = 1.0) -> Tensor:
    """A random matrix of spectral norm R with a leading singular value that stands out."""
    (matrix,) = normal(*shape, seed=seed)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s[0] = 1.5 * s[0]
    return (u * s) @ vh * (radius(shape, c) / s[0])


def leading(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return torch.outer(u[:, 0], vh[0])


@over_shapes
@pytest.mark.parametrize("c", [1.0, 2.0])
def test_a_step_starts_from_the_sphere(shape: tuple[int, int], c: float) -> None:
    """Wherever the weights were: norm R in the defaults' float32, and the step itself has norm lr R."""
    (weight,) = normal(*shape, seed=1)
    run = walk(SpectralSphere, weight.float(), normal(*shape, 10), lr=0.05, radius=c)
    for new, update in zip(run.weights[3:], run.updates[2:], strict=True):  # the first power iterations are rough
        start = torch.linalg.matrix_norm((new + 0.05 * update).double(), 2)
        assert float(start) == pytest.approx(radius(shape, c), rel=2e-3)
    exact = walk(SpectralSphere, weight, normal(*shape, 3), lr=0.05, radius=c, **EXACT)
    for new, update in zip(exact.weights[1:], exact.updates, strict=True):
        start = torch.linalg.matrix_norm(new + 0.05 * update, 2)
        assert float(start) == pytest.approx(radius(shape, c), rel=1e-6)
        assert float(torch.linalg.matrix_norm(update, 2)) == pytest.approx(radius(shape, c), rel=1e-6)


@over_shapes
def test_the_step_is_tangent(shape: tuple[int, int]) -> None:
    """<Theta, Phi> is within the tolerance for the right vector v that the state holds, with u = W v / ||W v||, and for
    the true ones.
    """
    weight = on_the_sphere(shape).float()
    run = walk(SpectralSphere, weight, normal(*shape, 6), lr=0.05, power_iterations=100)
    for old, update, state in zip(run.weights, run.updates, run.states, strict=False):
        phi = update.double() / radius(shape)
        right = state["right"].flatten().double()
        left = old.double() @ right
        theta = torch.outer(left / left.norm(), right)
        assert abs(float((theta * phi).sum())) <= 2e-4 + 1e-5
        assert abs(float((leading(old) * phi).sum())) <= 1e-3
    free = walk(SpectralSphere, weight, normal(*shape, 6), lr=0.05, lambda_search=False)
    assert (
        max(abs(float((leading(old) * new).sum())) for old, new in zip(free.weights, free.updates, strict=False)) > 0.1
    )


@over_shapes
@over_searches
def test_halving_the_rate_quarters_the_deviation(shape: tuple[int, int], search: bool) -> None:
    """The step leaves the sphere in second order; without the search in first."""
    weight, (grad,) = on_the_sphere(shape), normal(*shape)
    deviations = []
    for lr in (4e-4, 2e-4, 1e-4):
        run = walk(SpectralSphere, weight, [grad], lr=lr, lambda_search=search, **EXACT)
        deviations.append(abs(float(torch.linalg.matrix_norm(run.weights[-1], 2)) - radius(shape)))
    for coarse, fine in pairwise(deviations):
        assert coarse / fine == pytest.approx(4.0 if search else 2.0, rel=0.1)


@over_shapes
def test_without_the_search_it_is_muon_after_a_retraction(shape: tuple[int, int]) -> None:
    """With the spectral scale."""
    grads = normal(*shape, 5)
    run = walk(SpectralSphere, normal(*shape, seed=1)[0], grads, lr=0.05, lambda_search=False, **EXACT)
    muon = walk(
        Muon, normal(*shape, seed=1)[0], lr=0.05, weight_decay=0.0, momentum=0.9, method="svd", lr_scale="spectral"
    )
    for grad in grads:
        with torch.no_grad():
            muon.param.mul_(radius(shape) / torch.linalg.matrix_norm(muon.param, 2))
        muon.step(grad)
    assert relative(run.weights[-1], muon.weights[-1]) < 1e-8
    assert all(float(state["multiplier"]) == 0.0 for state in run.states)


@over_shapes
def test_size_of_the_gradients_does_not_matter(shape: tuple[int, int]) -> None:
    weight, grads = on_the_sphere(shape), normal(*shape, 4)
    plain = walk(SpectralSphere, weight, grads, **EXACT)
    for size in (1e-6, 1e6):
        scaled = walk(SpectralSphere, weight, [grad * size for grad in grads], **EXACT)
        assert relative(scaled.weights[-1], plain.weights[-1]) < 1e-8


def test_rotated_problems_have_rotated_answers() -> None:
    weight, grads = on_the_sphere((8, 5)), normal(8, 5, 3)
    left, right = rotation(8), rotation(5, seed=8)
    plain = walk(SpectralSphere, weight, grads, **EXACT)
    turned = walk(SpectralSphere, left @ weight @ right, [left @ grad @ right for grad in grads], **EXACT)
    assert relative(turned.weights[-1], left @ plain.weights[-1] @ right) < 1e-6


@pytest.mark.parametrize("method", ["polar_express", "svd"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gradient_along_the_leading_direction(sign: float, method: str) -> None:
    """M = +-Theta, where <Theta, Phi> jumps over 0: no NaN, and a step no longer than any other."""
    weight = on_the_sphere((6, 4))
    options = {"method": method, "steps": 8 if method == "polar_express" else None}
    run = walk(SpectralSphere, weight, [sign * leading(weight)] * 3, lr=0.05, **options)
    for new, update in zip(run.weights[1:], run.updates, strict=True):
        assert torch.isfinite(new).all()
        assert float(torch.linalg.matrix_norm(update, 2)) <= radius((6, 4)) * 1.15


@over_searches
def test_a_gradient_of_rank_one(search: bool) -> None:
    """Of another direction: the step is tangent all the same."""
    weight = on_the_sphere((6, 4)).float()
    (left,), (right,) = normal(6, 1, seed=4), normal(4, 1, seed=5)
    run = walk(SpectralSphere, weight, [left @ right.T], power_iterations=200, lr=0.05, lambda_search=search)
    assert torch.isfinite(run.weights[-1]).all()
    tangency = abs(float((leading(weight) * run.updates[0]).sum())) / radius((6, 4))
    assert tangency < 2e-3 if search else tangency > 0.01


@over_searches
def test_zero_weights_take_muons_step_and_reach_the_sphere(search: bool) -> None:
    zero, grads = torch.zeros(6, 4, dtype=torch.float64), normal(6, 4, 3)
    run = walk(SpectralSphere, zero, grads, lr=0.05, lambda_search=search, **EXACT)
    muon = walk(Muon, zero, grads[:1], lr=0.05, weight_decay=0.0, momentum=0.9, method="svd", lr_scale="spectral")
    assert relative(run.weights[1], muon.weights[1]) < 1e-10
    start = run.weights[2] + 0.05 * run.updates[1]
    assert float(torch.linalg.matrix_norm(start, 2)) == pytest.approx(radius((6, 4)), rel=1e-2)


def test_the_largest_row_may_be_a_trap() -> None:
    """The leading right vector is orthogonal to the largest row: power iteration from that row would not find it."""
    weight = torch.zeros(6, 4, dtype=torch.float64)
    weight[0, 0] = 3.0
    weight[1:, 1] = 2.0  # together sqrt(20)
    run = walk(SpectralSphere, weight, [normal(6, 4)[0]], power_iterations=100, lr=1e-9)
    assert float(torch.linalg.matrix_norm(run.weights[-1], 2)) == pytest.approx(radius((6, 4)), rel=1e-6)


def test_equal_leading_singular_values() -> None:
    """Any of their directions will do."""
    weight = torch.linalg.qr(normal(6, 4)[0]).Q
    run = walk(SpectralSphere, weight, normal(6, 4, 5, seed=3), lr=0.05)
    for new in run.weights[1:]:
        assert float(torch.linalg.matrix_norm(new, 2)) == pytest.approx(radius((6, 4)), rel=0.2)


@over_shapes
def test_stays_on_the_sphere_for_long(shape: tuple[int, int]) -> None:
    """In float32 with the defaults, whatever size the weights began with."""
    weight = 30.0 * normal(*shape, seed=1)[0].float()
    run = walk(SpectralSphere, weight, normal(*shape, 60), lr=0.02)
    for new in run.weights[5:]:
        assert float(torch.linalg.matrix_norm(new, 2)) == pytest.approx(radius(shape), rel=0.02)


def test_weight_decay_is_undone_by_the_retraction() -> None:
    weight, grads = on_the_sphere((6, 4)), normal(6, 4, 3)
    plain = walk(SpectralSphere, weight, grads, lr=0.05, **EXACT)
    decayed = walk(SpectralSphere, weight, grads, lr=0.05, weight_decay=5.0, **EXACT)
    assert relative(decayed.weights[-1], plain.weights[-1]) < 1e-8


def test_the_multiplier_comes_back_with_a_checkpoint() -> None:
    """The search goes on from it, and the power iteration from its vectors."""
    run = walk(SpectralSphere, on_the_sphere((6, 4)), normal(6, 4, 3), lr=0.05)
    other = walk(SpectralSphere, run.weights[-1], lr=0.05)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    (grad,) = normal(6, 4, seed=9)
    run.step(grad)
    other.step(grad)
    assert torch.equal(run.weights[-1], other.weights[-1])
    assert torch.equal(run.states[-1]["multiplier"], other.states[-1]["multiplier"])
    assert float(run.states[-1]["multiplier"]) != 0.0


def test_the_search_may_be_switched_off() -> None:
    """From then on the multiplier is 0, as the state says."""
    run = walk(SpectralSphere, on_the_sphere((6, 4)), normal(6, 4, 2), lr=0.05)
    assert float(run.states[-1]["multiplier"]) != 0.0
    run.optimizer.param_groups[0]["lambda_search"] = False
    run.step(normal(6, 4, seed=5)[0])
    assert float(run.states[-1]["multiplier"]) == 0.0


@pytest.mark.parametrize("shape", [(32, 12), (12, 32), (16, 16)], ids=SHAPES)
def test_the_search_is_short(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes in faster than by halving, which takes twelve steps or more to the default tolerance."""
    plain, counts = SpectralSphere.orthogonalize, [0]

    def counted(self: SpectralSphere, *args: Any, **kwargs: Any) -> Tensor:
        counts[-1] += 1
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(SpectralSphere, "orthogonalize", counted)
    run = walk(SpectralSphere, on_the_sphere(shape).float(), lr=0.02)
    for grad in normal(*shape, 10):
        run.step(grad)
        counts.append(0)
    assert sum(counts) / 10 <= 6, counts


def test_a_zero_gradient_after_a_search_is_no_step() -> None:
    """Without momentum nothing is left to orthogonalize but the multiple of Theta, which must not be."""
    run = walk(SpectralSphere, on_the_sphere((6, 4)), normal(6, 4, 2), lr=0.05, momentum=0.0, nesterov=False)
    run.step(torch.zeros(6, 4))
    assert float(run.updates[-1].abs().max()) == 0.0
    assert float(run.states[-1]["multiplier"]) == 0.0
