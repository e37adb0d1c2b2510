"""Conda: what its equations promise, and how it compares with pytorch-optimizer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import Conda
from tests.optim.rule_cases import normal
from tests.optim.rule_walk import relative, walk

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def rotated(matrix: Tensor, basis: Tensor) -> Tensor:
    return matrix @ basis if matrix.shape[0] >= matrix.shape[1] else basis.T @ matrix


@over_shapes
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_first_step_has_root_mean_square_scale(shape: tuple[int, int], scale: float) -> None:
    """Every entry is +-1 in the rotated basis."""
    (weight,), (grad,) = normal(*shape, seed=1), normal(*shape)
    run = walk(Conda, weight, [grad], scale=scale, eps=1e-30)
    assert float(run.updates[0].square().mean().sqrt()) == pytest.approx(scale, rel=1e-10)
    entries = rotated(run.updates[0], run.states[0]["basis"].squeeze(0)) / scale
    torch.testing.assert_close(entries.abs(), torch.ones_like(entries), rtol=1e-6, atol=0)
    rough = walk(Conda, weight.float(), [grad], scale=scale)
    assert float(rough.updates[0].square().mean().sqrt()) == pytest.approx(scale, rel=1e-4)


@over_shapes
def test_is_adam_in_the_rotated_basis(shape: tuple[int, int]) -> None:
    """torch's AdamW on W Q, with gradients G Q; its learning rate and decay are those of the entries."""
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 8)
    run = walk(Conda, weight, grads, lr=0.01, weight_decay=0.3, scale=0.5, eps=1e-20)
    basis = run.states[0]["basis"].squeeze(0)
    param = nn.Parameter(rotated(weight, basis))
    adam = torch.optim.AdamW([param], lr=0.01 * 0.5, betas=(0.9, 0.99), eps=1e-20, weight_decay=0.3 / 0.5)
    for grad, wanted in zip(grads, run.weights[1:], strict=True):
        param.grad = rotated(grad, basis)
        adam.step()
        assert relative(param.detach(), rotated(wanted, basis)) < 1e-10


@over_shapes
def test_the_basis_is_orthogonal_and_of_the_shorter_side(shape: tuple[int, int]) -> None:
    """And diagonalizes the first moment of the step at which it was made."""
    run = walk(Conda, normal(*shape, seed=1)[0], normal(*shape, 1))
    basis, side = run.states[0]["basis"].squeeze(0), min(shape)
    assert basis.shape == (side, side)
    torch.testing.assert_close(basis.T @ basis, torch.eye(side, dtype=torch.float64), rtol=0, atol=1e-12)
    moment = rotated(run.states[0]["exp_avg"], basis)
    gram = moment.T @ moment if shape[0] >= shape[1] else moment @ moment.T
    assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-12


@pytest.mark.parametrize("every", [1, 3, 100])
def test_refresh_of_the_basis(every: int) -> None:
    """At steps 1, 1 + T, 1 + 2T, ...: between them it stays to the last bit."""
    run = walk(Conda, normal(6, 4, seed=1)[0], normal(6, 4, 8), update_every=every)
    bases = [state["basis"] for state in run.states]
    fresh = [t for t in range(2, 9) if not torch.equal(bases[t - 1], bases[t - 2])]
    assert fresh == [t for t in range(2, 9) if (t - 1) % every == 0]


def test_every_matrix_refreshes_at_its_own_steps() -> None:
    """One of a stack that missed a gradient is a step behind."""
    first, second = (nn.Parameter(weight) for weight in normal(6, 4, 2, seed=1))
    optimizer = Conda([first, second], update_every=2)
    changed: dict[int, list[int]] = {0: [], 1: []}
    bases: list[Tensor | None] = [None, None]
    for t, grads in enumerate(zip(normal(6, 4, 6), normal(6, 4, 6, seed=3), strict=True), 1):
        first.grad, second.grad = grads[0], None if t == 1 else grads[1]
        optimizer.step()
        for index, param in enumerate((first, second)):
            basis = optimizer.state[param]["basis"].clone()
            if param.grad is not None and (bases[index] is None or not torch.equal(basis, bases[index])):
                changed[index].append(t)
            if param.grad is not None:
                bases[index] = basis
    assert changed == {0: [1, 3, 5], 1: [2, 4, 6]}


@over_shapes
def test_the_second_moment_is_not_rotated_with_the_basis(shape: tuple[int, int]) -> None:
    run = walk(Conda, normal(*shape, seed=1)[0], normal(*shape, 5), update_every=2)
    second = torch.zeros(shape, dtype=torch.float64)
    for grad, state in zip(normal(*shape, 5), run.states, strict=True):
        second = 0.99 * second + 0.01 * rotated(grad, state["basis"].squeeze(0)).square()
        assert relative(state["exp_avg_sq"], second) < 1e-10


@over_shapes
def test_size_of_the_gradients_does_not_matter(shape: tuple[int, int]) -> None:
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 5)
    plain = walk(Conda, weight, grads, eps=1e-30)
    for size in (1e-5, 1e5):
        scaled = walk(Conda, weight, [grad * size for grad in grads], eps=1e-30)
        assert relative(scaled.weights[-1], plain.weights[-1]) < 1e-9


def test_a_first_gradient_of_zeros() -> None:
    """As behind a layer that starts at zero: the basis comes with the first gradient that is not."""
    (weight,) = normal(6, 4, seed=1)
    run = walk(Conda, weight, [torch.zeros(6, 4), torch.zeros(6, 4), *normal(6, 4, 2)], weight_decay=0.0)
    assert torch.equal(run.weights[2], weight)
    assert torch.isfinite(run.weights[-1]).all()
    moment = rotated(run.states[2]["exp_avg"], run.states[2]["basis"].squeeze(0))
    gram = moment.T @ moment
    assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-12
    assert torch.equal(run.states[3]["basis"], run.states[2]["basis"])


def test_refreshes_are_counted_from_the_first_basis() -> None:
    """Here at step 3; a NaN in the gradient leaves the basis as it was, and the step after tries again."""
    grads = [torch.zeros(6, 4), torch.zeros(6, 4), *normal(6, 4, 6)]
    run = walk(Conda, normal(6, 4, seed=1)[0], grads, update_every=3)
    bases = [state["basis"] for state in run.states]
    assert [t for t in range(2, 9) if not torch.equal(bases[t - 1], bases[t - 2])] == [3, 6]
    assert [int(state["age"]) for state in run.states] == [0, 0, 1, 2, 0, 1, 2, 0]
    grads[5] = torch.full((6, 4), torch.nan)
    spoiled = walk(Conda, normal(6, 4, seed=1)[0], grads, update_every=3)
    assert torch.equal(spoiled.states[-1]["basis"], bases[4])
    assert [int(state["age"]) for state in spoiled.states] == [0, 0, 1, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("size", [1e-23, 1e-30])
def test_tiny_gradients_keep_their_basis(size: float) -> None:
    """Also where their squares vanish."""
    run = walk(Conda, normal(6, 4, seed=1)[0].float(), [grad * size for grad in normal(6, 4, 4)])
    assert not torch.equal(run.states[0]["basis"].squeeze(0), torch.eye(4))
    for state in run.states[1:]:
        assert torch.equal(state["basis"], run.states[0]["basis"])


def peers(weight: Tensor, grads: list[Tensor], **options: float) -> list[Tensor]:
    """Weights after each step of pytorch-optimizer's Conda."""
    optimizers = pytest.importorskip("pytorch_optimizer")
    param = nn.Parameter(weight.clone())
    optimizer = optimizers.Conda([param], betas=(0.9, 0.99), scale=0.25, eps=1e-8, **options)
    weights = []
    for grad in grads:
        param.grad = grad.to(weight.dtype).clone()
        optimizer.step()
        weights.append(param.detach().clone())
    return weights


@over_shapes
def test_goes_the_way_of_pytorch_optimizers(shape: tuple[int, int]) -> None:
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 20)
    theirs = peers(weight.float(), grads, lr=0.01)
    ours = walk(Conda, weight.float(), grads, lr=0.01, weight_decay=0.0)
    for found, wanted in zip(ours.weights[1:], theirs, strict=True):
        assert relative(found - weight, wanted - weight) < 1e-3


@over_shapes
def test_decays_before_the_step_where_theirs_decays_after(shape: tuple[int, int]) -> None:
    """Theirs also shrinks the update by lr * weight_decay; that is all the difference of a step."""
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 1)
    theirs = peers(weight.float(), grads, lr=0.1, weight_decay=0.5)[0]
    ours = walk(Conda, weight.float(), grads, lr=0.1, weight_decay=0.5)
    wanted = ours.weights[1] + 0.1 * 0.5 * 0.1 * ours.updates[0]
    assert relative(theirs, wanted) < 1e-5
    assert relative(theirs, ours.weights[1]) > 1e-4


def test_refreshes_a_step_after_theirs() -> None:
    """Ours at steps 1, 4, 7, a full period each; theirs at 1, 3, 6."""
    (weight,), grads = normal(12, 5, seed=1), normal(12, 5, 4)
    theirs = peers(weight.float(), grads, lr=0.01, update_proj_gap=3)
    ours = walk(Conda, weight.float(), grads, lr=0.01, weight_decay=0.0, update_every=3)
    assert relative(ours.weights[2] - weight, theirs[1] - weight) < 1e-4
    assert relative(ours.weights[3] - weight, theirs[2] - weight) > 1e-2
