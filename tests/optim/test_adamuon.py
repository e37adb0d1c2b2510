"""AdaMuon: what its equations promise, and the trajectory of pytorch-optimizer's where that is the same rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import AdaMuon, Muon
from tests.optim.rule_cases import distance, normal, rotation, signed_permutation, updates

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_sign = pytest.mark.parametrize("sign", [True, False])
HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)


@over_shapes
@over_sign
def test_rms_is_a_fifth_to_the_last_bits(shape: tuple[int, int], sign: bool) -> None:
    for update in updates(AdaMuon, normal(*shape, 5), sign=sign):
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-12)


@over_shapes
@over_sign
@pytest.mark.parametrize("method", ["jordan", "svd"])
def test_first_step_is_a_fifth_of_the_signs_of_the_polar_factor(
    shape: tuple[int, int], sign: bool, method: str
) -> None:
    """sqrt(V) is |O| times a constant at the first step, whatever beta2."""
    grads = normal(*shape)
    (polar,) = updates(Muon, [grads[0].sign()] if sign else grads, method=method)
    (update,) = updates(AdaMuon, grads, sign=sign, method=method, eps=1e-30)
    # An entry of O that is 0 but for rounding has no sign: wide integer matrices may have some.
    clear = polar.abs() > 1e-9
    assert clear.float().mean() > 0.9
    scale = float(update.abs().max())
    torch.testing.assert_close(update[clear], scale * polar.sign()[clear], rtol=1e-10, atol=0)
    if clear.all():
        assert scale == pytest.approx(0.2, rel=1e-10)


@over_shapes
def test_without_memory_every_step_is_a_sign(shape: tuple[int, int]) -> None:
    grads = normal(*shape, 4)
    for update, muon in zip(
        updates(AdaMuon, grads, sign=False, beta2=0.0, eps=1e-30), updates(Muon, grads), strict=True
    ):
        torch.testing.assert_close(update, 0.2 * muon.sign(), rtol=1e-10, atol=0)


@over_shapes
def test_signs_are_those_of_muon_and_sizes_are_not(shape: tuple[int, int]) -> None:
    grads = normal(*shape, 5)
    ours, muon = updates(AdaMuon, grads, sign=False), updates(Muon, grads)
    for update, plain in zip(ours, muon, strict=True):
        assert torch.equal(update.sign(), plain.sign())
        assert distance([update], [plain]) > 0.1


def test_entrywise_rescaling_of_the_momentum_is_forgotten_by_the_sign() -> None:
    grads = normal(5, 12)
    rescaled = [grads[0] * normal(5, 12, seed=1)[0].exp()]
    assert distance(updates(AdaMuon, rescaled), updates(AdaMuon, grads)) < 1e-12
    assert distance(updates(AdaMuon, rescaled, sign=False), updates(AdaMuon, grads, sign=False)) > 0.1


@over_shapes
@over_sign
@pytest.mark.parametrize("factor", [2.0**-20, 1e6])
def test_the_scale_of_the_gradients_does_not_matter(shape: tuple[int, int], sign: bool, factor: float) -> None:
    grads = normal(*shape, 4)
    ours = updates(AdaMuon, [factor * g for g in grads], sign=sign)
    assert distance(ours, updates(AdaMuon, grads, sign=sign)) < 1e-8


@over_sign
def test_follows_permutations_and_signs_but_no_rotation(sign: bool) -> None:
    grads = normal(6, 9, 4, seed=1)
    plain = updates(AdaMuon, grads, sign=sign)
    for turn, follows in ((signed_permutation, True), (rotation, False)):
        left, right = turn(6), turn(9)
        error = distance(
            updates(AdaMuon, [left @ g @ right for g in grads], sign=sign), [left @ u @ right for u in plain]
        )
        assert (error < 1e-8) if follows else (error > 0.1)


def test_is_muon_where_the_polar_factor_has_entries_of_one_size() -> None:
    grads = [HADAMARD, -HADAMARD, 3 * HADAMARD, HADAMARD]
    assert distance(updates(AdaMuon, grads, method="svd"), updates(Muon, grads, method="svd")) < 1e-6


def test_the_momentum_itself_keeps_its_sizes() -> None:
    """Only a copy is replaced by its sign."""
    grads = normal(5, 12, 3)
    param = nn.Parameter(torch.zeros(5, 12, dtype=torch.float64))
    optimizer = AdaMuon([param], momentum=0.9, nesterov=False)
    wanted = torch.zeros(5, 12, dtype=torch.float64)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        wanted = 0.9 * wanted + 0.1 * grad
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], wanted)


@over_sign
def test_a_zero_gradient_moves_nothing(sign: bool) -> None:
    (update,) = updates(AdaMuon, [torch.zeros(4, 6)], sign=sign)
    assert torch.equal(update, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("key", "value"), [("beta2", 1.0), ("beta2", -0.5), ("eps", -1e-3), ("sign", "yes"), ("momentum", 1.5)]
)
def test_names_a_bad_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        AdaMuon([nn.Parameter(torch.randn(3, 4))], **{key: value})


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> type[torch.optim.Optimizer]:
    """pytorch-optimizer's AdaMuon, orthogonalizing in float64 instead of bfloat16."""
    module = pytest.importorskip(
        "pytorch_optimizer.optimizer.muon.adamuon", reason="needs pytorch-optimizer 4.1 or later"
    )
    exact = partial(module.zero_power_via_newton_schulz_5, dtype=torch.float64)
    monkeypatch.setattr(module, "zero_power_via_newton_schulz_5", exact)
    return module.AdaMuon


def both(theirs: Any, weight: Tensor, grads: list[Tensor], lr_scale: str, **ours: Any) -> tuple[Tensor, Tensor]:
    one, other = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizers = (
        AdaMuon([one], lr=0.02, weight_decay=0.1, momentum=0.9, beta2=0.8, lr_scale=lr_scale, **ours),
        theirs(
            [{"params": [other], "use_muon": True}],
            lr=0.02,
            weight_decay=0.1,
            betas=(0.9, 0.8),
            eps=1e-8,
            use_adjusted_lr=lr_scale == "match_rms_adamw",
        ),
    )
    for step, grad in enumerate(grads):
        for optimizer, param in zip(optimizers, (one, other), strict=True):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 + 0.5 * step)
            param.grad = grad.clone()
            optimizer.step()
    return one.detach(), other.detach()


@over_shapes
@pytest.mark.parametrize("lr_scale", ["match_rms_adamw", "original"])
def test_same_trajectory_as_pytorch_optimizer(theirs: Any, shape: tuple[int, int], lr_scale: str) -> None:
    """Theirs corrects the bias of V: a common factor that the norm takes out again, but for eps."""
    weight, *grads = normal(*shape, 7)
    one, other = both(theirs, weight, grads, lr_scale, sign=False, nesterov=False)
    assert float((one - other).norm()) < 1e-6 * float((other - weight).norm())


@pytest.mark.parametrize("option", ["sign", "nesterov"])
def test_pytorch_optimizer_has_neither_sign_nor_nesterov(theirs: Any, option: str) -> None:
    """With the paper's sign, or the authors' Nesterov, we go elsewhere."""
    weight, *grads = normal(12, 5, 7)
    one, other = both(theirs, weight, grads, "match_rms_adamw", **{"sign": False, "nesterov": False, option: True})
    assert float((one - other).norm()) > 0.05 * float((other - weight).norm())
