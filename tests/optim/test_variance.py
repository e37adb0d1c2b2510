"""Muon-NSR and Muon-VS: what their equations promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import Muon, MuonNSR, MuonVS
from tests.optim.rule_cases import distance, normal, rotation, signed_permutation, updates

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_rules = pytest.mark.parametrize("rule", [MuonNSR, MuonVS])
BETA = 0.9
TINY = 1e-30  # an eps too small to be seen, where the test is about exact homogeneity


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Muon's updates without momentum."""
    return updates(Muon, matrices, momentum=0.0)


@over_rules
@over_shapes
def test_first_step_is_muons_on_the_signs(rule: type, shape: tuple[int, int]) -> None:
    """Momentum and variance are multiples of the gradient and its square, entry by entry."""
    grads = normal(*shape)
    assert distance(updates(rule, grads), orthogonalized([grads[0].sign()])) < 1e-6
    assert distance(updates(rule, grads), orthogonalized(grads)) > 0.1


@over_rules
@over_shapes
def test_momentum_squared_plus_variance_is_the_average_of_squares(rule: type, shape: tuple[int, int]) -> None:
    """At every step, as the variance is that of the moving average exactly."""
    param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = rule([param], momentum=BETA)
    squares = torch.zeros(shape, dtype=torch.float64)
    for step, grad in enumerate(normal(*shape, 8), 1):
        param.grad = grad.clone()
        optimizer.step()
        squares = BETA * squares + (1 - BETA) * grad**2
        state = optimizer.state[param]
        torch.testing.assert_close(state["momentum_buffer"] ** 2 + state["variance"], squares, rtol=1e-12, atol=1e-14)
        assert (state["variance"] >= 0).all()
        assert float(state["step"]) == step


def test_variance_of_a_constant_gradient_dies_out() -> None:
    (grad,) = normal(5, 12)
    param = nn.Parameter(torch.zeros(5, 12, dtype=torch.float64))
    optimizer = MuonVS([param], momentum=BETA)
    for step in range(1, 20):
        param.grad = grad.clone()
        optimizer.step()
        wanted = BETA**step * (1 - BETA**step) * grad**2
        torch.testing.assert_close(optimizer.state[param]["variance"], wanted, rtol=1e-10, atol=0)


@over_shapes
def test_without_gamma_the_look_ahead_is_replaced_by_its_signs(shape: tuple[int, int]) -> None:
    """Here the order of the steps shows: bias-corrected momentum, weighed by beta / (1 - beta), beside the gradient."""
    grads = normal(*shape, 6)
    looked, average = [], torch.zeros(shape, dtype=torch.float64)
    for step, grad in enumerate(grads, 1):
        average = BETA * average + (1 - BETA) * grad
        looked.append(grad + BETA / (1 - BETA) * average / (1 - BETA**step))
    ours = updates(MuonNSR, grads, momentum=BETA, gamma=0.0, eps=TINY)
    assert distance(ours, orthogonalized([matrix.sign() for matrix in looked])) < 1e-10


@over_shapes
def test_gamma_leads_from_signs_to_the_variance_scaled_form(shape: tuple[int, int]) -> None:
    grads = normal(*shape, 6)
    vs = updates(MuonVS, grads, momentum=BETA, eps=TINY)
    signs = updates(MuonNSR, grads, momentum=BETA, gamma=0.0, eps=TINY)
    to_vs = [distance(updates(MuonNSR, grads, momentum=BETA, gamma=g, eps=TINY), vs) for g in (1.0, 1e3, 1e6, 1e12)]
    assert to_vs == sorted(to_vs, reverse=True)
    assert to_vs[-1] < 1e-6
    assert to_vs[0] > 1e-2
    assert distance(updates(MuonNSR, grads, momentum=BETA, gamma=1.0, eps=TINY), signs) > 1e-2


@over_rules
def test_the_scale_of_each_entry_is_forgotten(rule: type) -> None:
    """Rescaling an entry's gradients at all steps changes nothing; Muon would see it."""
    grads = normal(5, 12, 5)
    scales = normal(5, 12, seed=1)[0].exp()
    rescaled = [scales * grad for grad in grads]
    assert distance(updates(rule, rescaled, eps=TINY), updates(rule, grads, eps=TINY)) < 1e-10
    assert distance(updates(Muon, rescaled), updates(Muon, grads)) > 0.1


@over_rules
@over_shapes
@pytest.mark.parametrize("factor", [2.0**-10, 1e6])
def test_the_scale_of_the_gradients_does_not_matter(rule: type, shape: tuple[int, int], factor: float) -> None:
    grads = normal(*shape, 4)
    assert distance(updates(rule, [factor * g for g in grads]), updates(rule, grads)) < 1e-3  # eps of 1e-8
    assert distance(updates(rule, [factor * g for g in grads], eps=TINY), updates(rule, grads, eps=TINY)) < 1e-9


@over_rules
def test_follows_permutations_and_signs_but_no_rotation(rule: type) -> None:
    grads = normal(6, 9, 4)
    plain = updates(rule, grads)
    for turn, follows in ((signed_permutation, True), (rotation, False)):
        left, right = turn(6), turn(9)
        error = distance(updates(rule, [left @ g @ right for g in grads]), [left @ u @ right for u in plain])
        assert (error < 1e-8) if follows else (error > 0.1)


@over_rules
@over_shapes
def test_update_has_the_rms_of_muons(rule: type, shape: tuple[int, int]) -> None:
    for update in updates(rule, normal(*shape, 4), method="svd"):
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-6)


@over_rules
def test_entries_without_gradient_do_no_harm(rule: type) -> None:
    """0 / (0 + eps), not 0 / 0; an eps of 1e-8 does not blow it up."""
    grads = normal(5, 12, 3)
    for grad in grads:
        grad[2] = 0
        grad[:, 4] = 0
    for update in updates(rule, grads):
        assert update.isfinite().all()
        assert not update[2].any()
        assert not update[:, 4].any()


@pytest.mark.parametrize(
    ("rule", "key", "value"),
    [
        (MuonNSR, "gamma", -1.0),
        (MuonNSR, "gamma", float("nan")),
        (MuonNSR, "eps", -1e-3),
        (MuonVS, "eps", -1e-3),
        (MuonNSR, "momentum", 1.0),
        (MuonVS, "momentum", -0.1),
    ],
)
def test_names_a_bad_value(rule: Any, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        rule([nn.Parameter(torch.randn(3, 4))], **{key: value})


def test_the_variance_scaled_form_has_no_gamma() -> None:
    with pytest.raises(TypeError, match="gamma"):
        MuonVS([nn.Parameter(torch.randn(3, 4))], gamma=10.0)
