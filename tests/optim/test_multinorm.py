"""SWAN and SinkGD: what their equations promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import SWAN, Muon, SinkGD
from tests.optim.rule_cases import distance, normal, rotation, signed_permutation, updates

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_rules = pytest.mark.parametrize("rule", [SWAN, SinkGD])


def standardised(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mean(dim=1, keepdim=True)) / matrix.std(dim=1, keepdim=True, correction=0)


def spread(norms: Tensor) -> float:
    return float((norms.max() - norms.min()) / norms.mean())


@over_rules
@over_shapes
def test_rms_is_as_told(rule: type, shape: tuple[int, int]) -> None:
    (update,) = updates(rule, normal(*shape), rms=0.3)
    assert float(update.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-12)
    (update,) = updates(rule, normal(*shape))
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-12)


@over_rules
def test_no_memory(rule: type) -> None:
    """The same gradient moves by the same amount whatever came before, and nothing is stored."""
    first, second = normal(5, 12, 2)
    after = updates(rule, [first, second])
    assert torch.equal(after[1], updates(rule, [second])[0])
    param = nn.Parameter(torch.randn(5, 12))
    optimizer = rule([param])
    param.grad = torch.randn(5, 12)
    optimizer.step()
    assert not optimizer.state[param]


@over_rules
@over_shapes
@pytest.mark.parametrize("factor", [2.0**-20, 1e6])
def test_the_scale_of_the_gradient_does_not_matter(rule: type, shape: tuple[int, int], factor: float) -> None:
    (grad,) = normal(*shape)
    # SWAN amplifies rounding: its 10 steps with beta=0.8 do not contract.
    assert distance(updates(rule, [factor * grad]), updates(rule, [grad])) < 1e-10


@over_rules
def test_follows_permutations_and_signs_of_rows_and_permutations_of_columns(rule: type) -> None:
    (grad,) = normal(6, 9)
    left, right = signed_permutation(6), signed_permutation(9).abs()
    (plain,) = updates(rule, [grad])
    assert distance(updates(rule, [left @ grad @ right]), [left @ plain @ right]) < 1e-10
    for one, other in ((rotation(6), torch.eye(9).double()), (torch.eye(6).double(), rotation(9))):
        assert distance(updates(rule, [one @ grad @ other]), [one @ plain @ other]) > 0.1


@over_rules
def test_a_zero_gradient_moves_nothing(rule: type) -> None:
    (update,) = updates(rule, [torch.zeros(4, 6)])
    assert torch.equal(update, torch.zeros(4, 6, dtype=torch.float64))


@over_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rows_stay_where_they_are(rule: type, dtype: torch.dtype) -> None:
    (grad,) = normal(5, 12)
    grad[2] = 0
    (update,) = updates(rule, [grad], dtype=dtype)
    assert update.isfinite().all()
    assert not update[2].any()
    assert update[3].any()


@over_rules
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_float32_gradients_of_any_size(rule: type, size: float) -> None:
    """Their squares are beyond float32."""
    (grad,) = normal(5, 12)
    (wanted,) = updates(rule, [grad])
    (update,) = updates(rule, [size * grad], dtype=torch.float32)
    assert distance([update.double()], [wanted]) < 1e-4


def test_swan_is_muon_without_momentum_on_standardised_rows() -> None:
    """With the convergent beta and enough steps."""
    for shape in ((5, 12), (4, 9)):
        (grad,) = normal(*shape)
        (muon,) = updates(Muon, [standardised(grad)], momentum=0.0, method="svd")
        assert distance(updates(SWAN, [grad], beta=0.5, steps=30), [muon]) < 1e-8
        assert distance(updates(Muon, [grad], momentum=0.0, method="svd"), [muon]) > 1e-2


def test_swan_of_a_tall_matrix_spreads_muons_norm_over_one_direction_less() -> None:
    """Rows of mean zero span n - 1 dimensions: Muon's RMS falls below 0.2 there, SWAN's does not."""
    (grad,) = normal(12, 5)
    (muon,) = updates(Muon, [standardised(grad)], momentum=0.0, method="svd")
    (update,) = updates(SWAN, [grad], beta=0.5, steps=30)
    assert distance([update], [muon * math.sqrt(5 / 4)]) < 1e-6


@over_shapes
def test_swan_forgets_mean_and_scale_of_each_row(shape: tuple[int, int]) -> None:
    (grad,) = normal(*shape)
    scales, shifts = normal(shape[0], 1, seed=1)[0].exp(), normal(shape[0], 1, seed=2)[0]
    assert distance(updates(SWAN, [scales * grad + shifts]), updates(SWAN, [grad])) < 1e-8
    columns = normal(1, shape[1], seed=1)[0].exp()
    assert distance(updates(SWAN, [grad * columns]), updates(SWAN, [grad])) > 0.1


@over_shapes
def test_swan_moves_rows_of_mean_zero(shape: tuple[int, int]) -> None:
    (update,) = updates(SWAN, normal(*shape))
    assert float(update.mean(dim=1).abs().max()) < 1e-10


def test_swan_of_default_beta_only_comes_near_equal_singular_values() -> None:
    """They wander in 0.56 to 1.6 with beta=0.8; with 0.5 they are equal."""
    (grad,) = normal(24, 64)
    loose = torch.linalg.svdvals(updates(SWAN, [grad])[0])
    tight = torch.linalg.svdvals(updates(SWAN, [grad], beta=0.5, steps=30)[0])
    assert 1.05 < float(loose.max() / loose.min()) < 1.6 / 0.56
    assert float(tight.max() / tight.min()) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1e-3, 12345.678])
def test_swan_leaves_rows_of_one_value_alone(value: float, dtype: torch.dtype) -> None:
    """As under a bias-like gradient. What rounding leaves of the row after its mean is not a direction."""
    (grad,) = normal(5, 7)
    grad[2] = value
    (update,) = updates(SWAN, [grad], dtype=dtype)
    assert float(update[2].abs().max()) < 1e-6
    assert update.isfinite().all()


@over_shapes
@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_sinkgd_ends_with_columns_of_equal_norm(shape: tuple[int, int], sweeps: int) -> None:
    (update,) = updates(SinkGD, normal(*shape), sweeps=sweeps)
    torch.testing.assert_close(
        update.norm(dim=0), torch.full((shape[1],), 0.2 * math.sqrt(shape[0]), dtype=torch.float64)
    )


def test_sinkgd_brings_rows_near_equal_norm() -> None:
    """8e-5 after five sweeps of a Gaussian 16 x 24 matrix; one sweep is far from it."""
    (grad,) = normal(16, 24)
    spreads = [spread(updates(SinkGD, [grad], sweeps=sweeps)[0].norm(dim=1)) for sweeps in (1, 2, 3, 4, 5)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 1e-2
    assert spreads[-1] < 1e-3


@over_shapes
def test_sinkgd_with_many_sweeps_forgets_the_scales_of_rows_and_columns(shape: tuple[int, int]) -> None:
    (grad,) = normal(*shape)
    rows, columns = normal(shape[0], 1, seed=1)[0].exp(), normal(1, shape[1], seed=2)[0].exp()
    scaled = rows * grad * columns
    assert distance(updates(SinkGD, [scaled], sweeps=200), updates(SinkGD, [grad], sweeps=200)) < 1e-8
    assert distance(updates(SinkGD, [scaled], sweeps=1), updates(SinkGD, [grad], sweeps=1)) > 1e-2


@pytest.mark.parametrize(
    ("rule", "key", "value"),
    [
        (SWAN, "beta", -0.5),
        (SWAN, "steps", 0),
        (SWAN, "steps", 2.5),
        (SWAN, "rms", -0.2),
        (SinkGD, "rms", math.nan),
        (SinkGD, "sweeps", 0),
        (SinkGD, "sweeps", 1.5),
    ],
)
def test_names_a_bad_value(rule: Any, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        rule([nn.Parameter(torch.randn(3, 4))], **{key: value})
