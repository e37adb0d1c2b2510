"""SpecMuon: what its equations promise, and where it gets the loss from."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import AdamW

import lightning_muon
from lightning_muon import HybridOptimizer
from lightning_muon.experimental import SpecMuon
from tests.lightning_helpers import Net, fit
from tests.optim.reference import polar
from tests.optim.rule_cases import normal
from tests.optim.rule_walk import relative, walk
from tests.optim.subjects import VECTOR_SHAPES, Bag, assert_same_bits, set_grads, snapshot

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def first_energies(loss: float, lr: float, singular_values: Tensor, relaxation: float = 0.5) -> Tensor:
    """r_j after a first step, from r_j = sqrt(L) before it."""
    root = loss**0.5
    damped = root / (1 + 0.5 * lr * singular_values / ((singular_values + 1e-8) * (root + 1e-8)))
    target = (1 - relaxation) * damped**2 + relaxation * loss + (1 - relaxation) * (damped - root) ** 2
    share = ((root - target.sqrt()) / (root - damped + 1e-8)).clamp(0, 1)
    return share * damped + (1 - share) * root


@over_shapes
def test_leading_directions_become_muons_as_the_rate_goes_to_zero(shape: tuple[int, int]) -> None:
    """With a constant loss the coefficients are 1; with the momentum of a heavy ball."""
    (weight,), grads = normal(*shape, seed=1), normal(*shape, 4)
    run = walk(SpecMuon, weight, grads, losses=[2.0] * 4, lr=1e-9)
    wanted = torch.zeros(shape, dtype=torch.float64)
    for grad, update in zip(grads, run.updates, strict=True):
        wanted = 0.95 * wanted + polar(grad)
        assert relative(update, wanted) < 1e-7


@over_shapes
def test_other_directions_keep_their_singular_values(shape: tuple[int, int]) -> None:
    (weight,), (grad,) = normal(*shape, seed=1), normal(*shape)
    run = walk(SpecMuon, weight, [grad], losses=[2.0], lr=1e-9, modes=2)
    u, s, vh = torch.linalg.svd(grad, full_matrices=False)
    values = torch.cat([torch.ones(2, dtype=torch.float64), s[2:] / grad.norm()])
    assert relative(run.updates[0], (u * values) @ vh) < 1e-7
    assert run.states[0]["energies"].numel() == 2


def test_a_large_rate_damps_the_leading_directions() -> None:
    """By r' / sqrt(L) = 1 / (1 + lr / (2 sqrt(L))), the less the larger the loss."""
    (weight,), (grad,) = normal(6, 4, seed=1), normal(6, 4)
    for loss in (0.25, 4.0):
        (update,) = walk(SpecMuon, weight, [grad], losses=[loss], lr=0.5).updates
        wanted = polar(grad) / (1 + 0.5 * 0.5 / loss**0.5)
        assert relative(update, wanted) < 1e-6


@pytest.mark.parametrize("relaxation", [0.0, 0.5, 0.9])
def test_energies_of_a_first_step(relaxation: float) -> None:
    (weight,), (grad,) = normal(6, 4, seed=1), normal(6, 4)
    run = walk(SpecMuon, weight, [grad], losses=[3.0], lr=0.5, relaxation=relaxation)
    wanted = first_energies(3.0, 0.5, torch.linalg.svdvals(grad) / grad.norm(), relaxation)
    torch.testing.assert_close(run.states[0]["energies"].flatten(), wanted, rtol=1e-6, atol=0)


def test_a_falling_loss_makes_long_steps() -> None:
    """By r' / sqrt(L): r comes down by the damping alone, one factor of 1 / (1 + lr / (2 sqrt(L))) a step."""
    (weight,), (grad,) = normal(6, 4, seed=1), normal(6, 4)
    run = walk(SpecMuon, weight, [grad] * 3, losses=[1.0, 1e-4, 1e-8], lr=1e-3, momentum=0.0)
    damped = [1 / (1 + 0.5e-3)]
    damped.append(float(first_energies(1.0, 1e-3, torch.ones(1))) / (1 + 0.5e-3 / 1e-2))
    damped.append(damped[1] / (1 + 0.5e-3 / 1e-4))
    for energy, loss, update in zip(damped, (1.0, 1e-4, 1e-8), run.updates, strict=False):
        assert relative(update, polar(grad) * energy / loss**0.5) < 1e-3
    assert float(run.updates[1].norm() / run.updates[0].norm()) == pytest.approx(95.2, rel=0.01)
    assert float(run.updates[2].norm() / run.updates[0].norm()) == pytest.approx(1588, rel=0.01)


@pytest.mark.parametrize("relaxation", [0.0, 0.5, 0.9])
def test_energies_never_rise(relaxation: float) -> None:
    """Whatever the loss does: it is no average of the loss."""
    losses = [1.0, 0.01, 4.0, 100.0, 100.0, 1e-6, 1.0, 1e4, *[1.0] * 12]
    run = walk(
        SpecMuon, normal(6, 4, seed=1)[0], normal(6, 4, 20), losses=losses, lr=0.05, relaxation=relaxation, modes=3
    )
    energies = torch.stack([state["energies"].flatten() for state in run.states])
    assert float(energies[0].max()) < 1.0
    assert (energies.diff(dim=0) < 1e-7).all()
    assert float(energies[-1].max()) < 0.8 * float(energies[0].min())


def test_the_loss_matters() -> None:
    (weight,), grads = normal(6, 4, seed=1), normal(6, 4, 3)
    falling = walk(SpecMuon, weight, grads, losses=[3.0, 1.0, 0.1], lr=0.1)
    constant = walk(SpecMuon, weight, grads, losses=[3.0, 3.0, 3.0], lr=0.1)
    assert relative(falling.weights[1], constant.weights[1]) == 0.0
    assert relative(falling.weights[-1], constant.weights[-1]) > 1e-3


@pytest.mark.parametrize("loss", [0.0, 1e-30, 1e30])
def test_extreme_losses(loss: float) -> None:
    run = walk(SpecMuon, normal(6, 4, seed=1)[0].float(), normal(6, 4, 3), losses=[loss] * 3)
    assert torch.isfinite(run.weights[-1]).all()


@pytest.mark.parametrize("loss", [1.5, torch.tensor(1.5), torch.tensor([1.5]), torch.tensor(1.5, requires_grad=True)])
def test_what_a_closure_may_return(loss: Any) -> None:
    (weight,), (grad,) = normal(6, 4, seed=1), normal(6, 4)
    wanted = walk(SpecMuon, weight, [grad], losses=[1.5])
    run = walk(SpecMuon, weight)
    run.step(grad, loss)
    assert torch.equal(run.weights[1], wanted.weights[1])


class Counted:
    """A loss that counts how often it is read, which on a GPU is a synchronization each."""

    def __init__(self) -> None:
        self.reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 2.0


def test_the_loss_is_read_once_a_step() -> None:
    bag, optimizer = _bag(hybrid=False)
    loss = Counted()
    for step in range(1, 4):
        set_grads(bag, step)
        assert optimizer.step(lambda: loss) is loss
        assert loss.reads == step


def test_groups_may_differ_in_modes() -> None:
    first, second = (nn.Parameter(weight) for weight in normal(6, 4, 2, seed=1))
    optimizer = SpecMuon([{"params": [first], "modes": 2}, {"params": [second], "modes": 3}])
    first.grad, second.grad = normal(6, 4, 2)
    optimizer.step(lambda: 2.0)
    assert [optimizer.state[param]["energies"].numel() for param in (first, second)] == [2, 3]


@pytest.mark.parametrize("hybrid", [False, True], ids=["alone", "hybrid"])
def test_a_step_without_a_loss_is_refused(hybrid: bool) -> None:
    """Before anything moves; and the loss of the last step is not used again."""
    bag, optimizer = _bag(hybrid)
    for make in (lambda: None, lambda: optimizer.step(lambda: torch.tensor(2.0))):
        make()
        set_grads(bag, 1)
        before = snapshot(bag, optimizer)
        with pytest.raises(RuntimeError, match="closure"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="closure"):
            optimizer.step(lambda: None)
        assert_same_bits(bag.values(), before[: len(bag.values())])


@pytest.mark.parametrize("hybrid", [False, True], ids=["alone", "hybrid"])
@pytest.mark.parametrize("loss", [-1.0, float("nan"), float("inf")])
def test_an_impossible_loss_is_refused(loss: float, hybrid: bool) -> None:
    bag, optimizer = _bag(hybrid)
    set_grads(bag, 1)
    before = bag.values()
    with pytest.raises(ValueError, match=str(loss)):
        optimizer.step(lambda: torch.tensor(loss))
    assert_same_bits(bag.values(), before)


def _bag(hybrid: bool) -> tuple[Bag, torch.optim.Optimizer]:
    bag = Bag(vectors=VECTOR_SHAPES if hybrid else ())
    optimizer = SpecMuon(bag.named("w"), lr=0.02)
    if not hybrid:
        return bag, optimizer
    return bag, HybridOptimizer({"other": AdamW(bag.named("v"), lr=0.02), "matrix": optimizer})


def test_in_a_hybrid_it_gets_the_loss_of_the_closure() -> None:
    """Which runs once, with gradients; the matrices go where they go alone."""
    bag, twin = Bag(vectors=VECTOR_SHAPES), Bag(vectors=VECTOR_SHAPES)
    hybrid = HybridOptimizer({"other": AdamW(bag.named("v"), lr=0.02), "matrix": SpecMuon(bag.named("w"), lr=0.02)})
    alone = SpecMuon(twin.named("w"), lr=0.02)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        hybrid.zero_grad()
        loss = bag(torch.tensor(1.0))
        loss.backward()
        losses.append(loss.detach())
        return loss

    for step in range(1, 4):
        assert float(hybrid.step(closure).detach()) == float(losses[-1])
        assert len(losses) == step
        twin.zero_grad()
        twin(torch.tensor(1.0)).backward()
        alone.step(lambda: losses[-1])  # the vectors, which the other optimizer moves, are part of the loss
        for (name, param), (_, wanted) in zip(bag.named("w"), twin.named("w"), strict=True):
            assert torch.equal(param, wanted), name


class Losses(Callback):
    """What the training steps returned."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.energies: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))
        (optimizer,) = trainer.optimizers
        state = optimizer.state[pl_module.layers.up.weight]
        self.energies += [state["energies"].clone()] if state else []  # none between steps that accumulate


def test_in_a_trainer_it_gets_the_training_loss() -> None:
    """Automatic optimization passes a closure. The energies after the first step tell which loss came."""
    torch.manual_seed(0)
    module = Net(matrix_optimizer=partial(SpecMuon, lr=0.3), other_optimizer=partial(AdamW, lr=1e-3))
    before = module.layers.up.weight.detach().clone()
    losses = Losses()
    fit(module, callbacks=[losses])
    assert len(losses.seen) == 5
    wanted = first_energies(losses.seen[0], 0.3, torch.ones(8))
    torch.testing.assert_close(losses.energies[0].flatten().double(), wanted.double(), rtol=1e-4, atol=0)
    assert float((module.layers.up.weight.detach() - before).norm()) > 0.1


class Recording(Net):
    """Keeps the losses of its training steps."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses = [*getattr(self, "losses", []), float(loss.detach())]
        return loss


def test_with_gradient_accumulation_it_gets_a_part_of_the_last_loss() -> None:
    """That of the last micro-batch, divided as the gradients are."""
    torch.manual_seed(0)
    module = Recording(matrix_optimizer=partial(SpecMuon, lr=0.3), other_optimizer=partial(AdamW, lr=1e-3))
    losses = Losses()
    fit(module, callbacks=[losses], accumulate_grad_batches=2, max_steps=1)
    wanted = first_energies(module.losses[1] / 2, 0.3, torch.ones(8))
    torch.testing.assert_close(losses.energies[-1].flatten().double(), wanted.double(), rtol=1e-4, atol=0)


def test_in_manual_optimization_without_a_closure_it_says_so() -> None:
    param = nn.Parameter(torch.randn(4, 5))
    param.grad = torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="closure"):
        SpecMuon([param]).step()


def test_gradients_of_low_rank() -> None:
    """Directions that are rounding error are left out, also among the leading ones."""
    (weight,), (left,), (right,) = normal(6, 4, seed=1), normal(6, 1, seed=2), normal(4, 1, seed=3)
    (update,) = walk(SpecMuon, weight.float(), [left @ right.T], losses=[1.0], lr=1e-6).updates
    wanted = polar(left @ right.T)
    assert relative(update, wanted) < 1e-4


def test_the_old_name_says_where_it_is() -> None:
    with pytest.warns(FutureWarning, match=r"import it as lightning_muon\.experimental\.SpecMuon"):
        assert lightning_muon.SpecMuon is SpecMuon
    with pytest.raises(AttributeError, match="has no attribute 'SpeMuon'"):
        _ = lightning_muon.SpeMuon
