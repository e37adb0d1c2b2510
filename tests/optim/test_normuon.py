"""NorMuon: what its equations promise, and the same trajectory as pytorch-optimizer's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import Muon, NorMuon
from tests.optim.reference import LR_SCALES
from tests.optim.rule_cases import distance, normal, rotation, updates

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_norms = pytest.mark.parametrize("norm", ["rms", "preserve"])


def spread(norms: Tensor) -> float:
    return float((norms.max() - norms.min()) / norms.mean())


@over_shapes
@over_norms
def test_first_step_has_equal_row_norms(shape: tuple[int, int], norm: str) -> None:
    """Where O itself, orthogonalized by five steps, has rows of different norms."""
    grads = normal(*shape)
    (update,) = updates(NorMuon, grads, norm=norm)
    assert spread(update.norm(dim=1)) < 1e-6
    assert spread(updates(Muon, grads)[0].norm(dim=1)) > 1e-2


@pytest.mark.parametrize(("shape", "dim"), [((12, 5), 1), ((5, 12), 0), ((7, 7), 1)])
def test_long_axis_equalizes_the_longer_side(shape: tuple[int, int], dim: int) -> None:
    (update,) = updates(NorMuon, normal(*shape), axis="long")
    assert spread(update.norm(dim=dim)) < 1e-6
    assert spread(update.norm(dim=1 - dim)) > 1e-2


def test_row_norms_stay_equal_only_without_memory() -> None:
    grads = normal(12, 5, 4)
    assert max(spread(update.norm(dim=1)) for update in updates(NorMuon, grads, beta2=0.0)) < 1e-6
    assert all(spread(update.norm(dim=1)) > 1e-2 for update in updates(NorMuon, grads, beta2=0.95)[1:])


@over_shapes
@pytest.mark.parametrize("axis", ["row", "long"])
def test_rms_is_a_fifth_to_the_last_bits(shape: tuple[int, int], axis: str) -> None:
    for update in updates(NorMuon, normal(*shape, 5), axis=axis):
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-12)


@over_shapes
@pytest.mark.parametrize("lr_scale", LR_SCALES)
def test_preserve_keeps_the_norm_of_muons_update(shape: tuple[int, int], lr_scale: str) -> None:
    grads = normal(*shape, 5)
    ours = updates(NorMuon, grads, norm="preserve", lr_scale=lr_scale)
    for update, muon in zip(ours, updates(Muon, grads, lr_scale=lr_scale), strict=True):
        assert float(update.norm()) == pytest.approx(float(muon.norm()), rel=1e-12)
        assert distance([update], [muon]) > 1e-3


@over_norms
@pytest.mark.parametrize("shape", [(5, 12), (7, 7)])
def test_is_muon_for_a_wide_exact_polar_factor(shape: tuple[int, int], norm: str) -> None:
    """Its rows have norm 1 already. Columns do not, and neither do the rows of a tall one."""
    grads = normal(*shape, 5)
    muon = updates(Muon, grads, method="svd")
    assert distance(updates(NorMuon, grads, norm=norm, method="svd"), muon) < 1e-12
    if shape[0] < shape[1]:
        assert distance(updates(NorMuon, grads, norm=norm, axis="long", method="svd"), muon) > 1e-2
        tall = [grad.T for grad in grads]
        assert distance(updates(NorMuon, tall, norm=norm, method="svd"), updates(Muon, tall, method="svd")) > 1e-2


@over_shapes
@pytest.mark.parametrize("factor", [2.0**-20, 1e6])
def test_the_scale_of_the_gradients_does_not_matter(shape: tuple[int, int], factor: float) -> None:
    grads = normal(*shape, 4)
    assert distance(updates(NorMuon, [factor * g for g in grads]), updates(NorMuon, grads)) < 1e-10


@pytest.mark.parametrize(("shape", "axis"), [((12, 5), "row"), ((5, 12), "row"), ((12, 5), "long")])
def test_follows_a_rotation_of_the_inputs_not_of_the_outputs(shape: tuple[int, int], axis: str) -> None:
    grads = normal(*shape, 4)
    plain = updates(NorMuon, grads, axis=axis)
    left, right = rotation(shape[0]), rotation(shape[1])
    assert distance(updates(NorMuon, [g @ right for g in grads], axis=axis), [u @ right for u in plain]) < 1e-10
    assert distance(updates(NorMuon, [left @ g for g in grads], axis=axis), [left @ u for u in plain]) > 1e-2


def test_the_long_axis_of_a_wide_matrix_is_that_of_the_tall_transpose() -> None:
    """So it follows rotations of the outputs there."""
    grads = normal(5, 12, 4)
    transposed = updates(NorMuon, [g.T for g in grads], axis="long")
    assert distance(updates(NorMuon, grads, axis="long"), [u.T for u in transposed]) < 1e-10


@over_norms
def test_zero_rows_stay_where_they_are(norm: str) -> None:
    """A unit that gets no gradient has O = 0 and v = 0: neither NaN nor a blow-up by 1 / eps."""
    grads = normal(12, 5, 3)
    for grad in grads:
        grad[3] = 0
    for update in updates(NorMuon, grads, norm=norm):
        assert torch.equal(update[3], torch.zeros(5, dtype=torch.float64))
        assert update.isfinite().all()


def test_state_is_one_number_a_row_beside_the_momentum() -> None:
    param = nn.Parameter(torch.randn(12, 5))
    optimizer = NorMuon([param])
    param.grad = torch.randn(12, 5)
    optimizer.step()
    assert sum(tensor.numel() for tensor in optimizer.state[param].values()) == 12 * 5 + 12
    assert (optimizer.state[param]["second_moment"] <= 0.05 * 1.21**2 / 5 * 5).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm", "l2"), ("axis", "column"), ("beta2", 1.0), ("beta2", -0.5), ("eps", -1e-3), ("momentum", 1.5)],
)
def test_names_a_bad_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        NorMuon([nn.Parameter(torch.randn(3, 4))], **{key: value})


def test_names_a_bad_value_of_one_group() -> None:
    with pytest.raises(ValueError, match=r"axis.*diagonal"):
        NorMuon([{"params": [nn.Parameter(torch.randn(3, 4))], "axis": "diagonal"}])


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> type[torch.optim.Optimizer]:
    """pytorch-optimizer's NorMuon, orthogonalizing in float64 instead of bfloat16."""
    module = pytest.importorskip(
        "pytorch_optimizer.optimizer.muon.normuon", reason="needs pytorch-optimizer 4.1 or later"
    )
    exact = partial(module.zero_power_via_newton_schulz_5, dtype=torch.float64)
    monkeypatch.setattr(module, "zero_power_via_newton_schulz_5", exact)
    return module.NorMuon


@over_shapes
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("our_scale", "their_scale"),
    [
        ({"norm": "rms"}, {"update_scale": "match_rms"}),
        (
            {"norm": "preserve", "lr_scale": "match_rms_adamw"},
            {"update_scale": "preserve_norm", "use_adjusted_lr": True},
        ),
        ({"norm": "preserve", "lr_scale": "original"}, {"update_scale": "preserve_norm", "use_adjusted_lr": False}),
    ],
    ids=["rms", "preserve-match_rms_adamw", "preserve-original"],
)
def test_same_trajectory_as_pytorch_optimizer(
    theirs: Any, shape: tuple[int, int], nesterov: bool, our_scale: dict[str, Any], their_scale: dict[str, Any]
) -> None:
    weight, *grads = normal(*shape, 7)
    shared = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "beta2": 0.8, "nesterov": nesterov, "eps": 1e-8}
    one, other = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    ours = NorMuon([one], **shared, **our_scale)
    reference = theirs([{"params": [other], "use_muon": True}], **shared, **their_scale, foreach=False)
    for step, grad in enumerate(grads):
        for optimizer, param in ((ours, one), (reference, other)):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 + 0.5 * step)
            param.grad = grad.clone()  # theirs looks ahead within the gradient itself
            optimizer.step()
    assert distance([one.detach() - weight], [other.detach() - weight]) < 1e-7  # they add eps to the norm too
