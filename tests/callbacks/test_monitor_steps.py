"""When the monitors measure: once an optimizer step, on the right one, whatever the Trainer does around it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_muon import Muon, MuonMixin
from tests.callbacks.monitor_records import (
    UPDATE_KEYS,
    WEIGHT_KEYS,
    all_three,
    assert_all,
    assert_values,
    expected,
    fit,
    only,
)
from tests.callbacks.monitor_subjects import PAIR_MATRICES, MuonPair, MuonZoo, Pair, Zoo

adamw = partial(AdamW, lr=0.02, weight_decay=0.5)


MODULES = {
    "Muon": lambda: MuonPair(matrix_optimizer=partial(Muon, lr=0.02, weight_decay=0.5)),
    "AdamW": lambda: Pair(adamw),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("accumulate", "batches", "steps"), [(2, 6, 3), (3, 7, 3), (4, 3, 1)])
def test_accumulated_batches_are_one_step(module: str, accumulate: int, batches: int, steps: int) -> None:
    """Two epochs; where the batches of an epoch do not divide, its last step has fewer of them."""
    records, recorder, fitted = fit(
        MODULES[module](),
        *all_three(),
        batches=batches,
        accumulate_grad_batches=accumulate,
        precision="64-true",
        max_steps=-1,
        max_epochs=2,
    )
    assert fitted.global_step == 2 * steps
    assert list(recorder.updates) == list(range(2 * steps))
    assert_all(records, recorder.weights, recorder.updates)
    assert records.series("spectral_norm/mean").keys() == records.series("loss").keys()


@pytest.mark.parametrize("module", MODULES)
def test_clipping_by_norm(module: str) -> None:
    records, recorder, _ = fit(MODULES[module](), *all_three(), gradient_clip_val=0.01, precision="64-true")
    norm = sum(float(g.square().sum()) for g in recorder.gradients[0].values()) ** 0.5
    assert norm <= 0.0101
    assert_all(records, recorder.weights, recorder.updates)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_precisions_with_float_weights(precision: str) -> None:
    for module in MODULES.values():
        records, recorder, _ = fit(module(), *all_three(), precision=precision)
        assert_all(records, recorder.weights, recorder.updates, rtol=1e-3)


def test_bfloat16_weights() -> None:
    records, recorder, _ = fit(MODULES["Muon"](), *all_three(), precision="bf16-true")
    assert {p.dtype for p in recorder.name_of} == {torch.bfloat16}
    assert_all(records, recorder.weights, recorder.observed)


def test_bfloat16_weights_under_an_optimizer_that_shows_no_updates() -> None:
    """What the step subtracted is then what the weights show, rounded as they are."""
    records, recorder, _ = fit(Pair(partial(AdamW, lr=0.02, weight_decay=0.0)), *all_three(), precision="bf16-true")
    assert_all(records, recorder.weights, recorder.updates)


@pytest.mark.parametrize("module", ["Muon", "AdamW"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_the_gradient_scaler_skips_are_not_measured(module: str, accumulate: int) -> None:
    base = {"Muon": MuonPair, "AdamW": Pair}[module]

    class Explodes(base):  # type: ignore[misc, valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx in (2 * accumulate, 3 * accumulate) else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    records, recorder, fitted = fit(
        Explodes() if module == "Muon" else Explodes(adamw),
        *all_three(),
        batches=6 * accumulate,
        accumulate_grad_batches=accumulate,
        max_steps=6,
        plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler),
    )
    assert scaler.get_scale() == 4.0
    assert fitted.global_step == 6
    assert list(recorder.updates) == [0, 1, 4, 5]
    assert_all(records, recorder.weights, recorder.updates, rtol=1e-3)
    assert list(records.series("loss")) == list(range(6))


def test_steps_that_a_fused_optimizer_skips_itself_are_not_measured() -> None:
    """It is called with infinite gradients too, and moves nothing."""

    class Explodes(Pair):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    records, recorder, _ = fit(
        Explodes(partial(adamw, fused=True)),
        *all_three(),
        plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler),
    )
    assert scaler.get_scale() == 8.0
    assert torch.equal(recorder.weights[1]["tall.weight"], recorder.weights[2]["tall.weight"])
    moved = only(recorder.updates, (0, 1, 3, 4))
    for key in UPDATE_KEYS:
        assert_values(records.at(key), expected(key, moved, PAIR_MATRICES), key, rtol=1e-3)


@pytest.mark.parametrize("module", ["Muon", "AdamW", "SGD with momentum"])
def test_training_step_that_returns_none_gives_no_update(module: str) -> None:
    base = MuonPair if module == "Muon" else Pair

    class Skips(base):  # type: ignore[misc, valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (0, 2) else loss

    make = {"Muon": None, "AdamW": adamw, "SGD with momentum": partial(SGD, lr=0.1, momentum=0.9)}[module]
    decoupled = module != "SGD with momentum"
    records, recorder, _ = fit(Skips(make) if make else Skips(), *all_three(), decoupled=decoupled, precision="64-true")
    moved = only(recorder.updates, (1, 3, 4))
    for key in UPDATE_KEYS:
        assert_values(records.at(key), expected(key, moved, PAIR_MATRICES), key)
    for key in WEIGHT_KEYS:
        logged = records.at(key)
        assert logged.keys() >= {1, 3, 4}
        assert_values(logged, expected(key, only(recorder.weights, logged), PAIR_MATRICES), key)


class EveryOther(Pair):
    """``wide`` takes part in batches 1 and 3 only."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.forward_wide = batch_idx % 2 == 1
        return super().training_step(batch, batch_idx)


class MuonEveryOther(MuonMixin, EveryOther):
    """The same with the mixin."""


@pytest.mark.parametrize("module", ["Muon", "AdamW", "SGD"])
def test_matrices_without_a_gradient_have_no_update_at_that_step(module: str) -> None:
    """Above all not one made of weight decay, which optimizers leave out too where there is no gradient."""
    made = {
        "Muon": lambda: MuonEveryOther(matrix_optimizer=partial(Muon, lr=0.02, weight_decay=0.5)),
        "AdamW": lambda: EveryOther(adamw),
        "SGD": lambda: EveryOther(partial(SGD, lr=0.1)),
    }[module]()
    records, recorder, _ = fit(made, *all_three(), decoupled=module != "SGD", precision="64-true")
    for step, updates in recorder.updates.items():
        assert ("wide.weight" in updates) == (step % 2 == 1)
    assert_all(records, recorder.weights, recorder.updates)


def test_zero_gradients_are_no_update_of_sgd() -> None:
    """As of an expert that no token chose: its gradient is zero, not missing."""

    class Idle(Pair):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.0 * self.wide.weight.sum()

    module = Idle(partial(SGD, lr=0.1))
    module.forward_wide = False
    records, recorder, _ = fit(module, *all_three(), decoupled=False, precision="64-true")
    for key in UPDATE_KEYS:
        assert_values(records.at(key), expected(key, recorder.updates, ["tall.weight"]), key)


class Manual(Pair):
    """Two optimizers under manual optimization; the second steps in every ``period``-th batch only."""

    def __init__(self, first: Any, second: Any, period: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second, self.period = first, second, period

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        if batch_idx % self.period == self.period - 1:
            second.step()

    def configure_optimizers(self) -> list[Optimizer]:
        rest = [p for name, p in self.named_parameters() if not name.startswith("wide.weight")]
        return [self.first(rest), self.second([self.wide.weight])]


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("kind", ["AdamW and SGD", "AdamW and Muon"])
def test_manual_optimization_with_two_optimizers(kind: str, period: int) -> None:
    """Both step in a batch: it is one step for the loggers, and each matrix has the update of its own optimizer."""
    second = partial(SGD, lr=0.1, momentum=0.9) if kind == "AdamW and SGD" else partial(Muon, lr=0.05, weight_decay=0.5)
    module = Manual(partial(AdamW, lr=0.02, weight_decay=0.5), second, period)
    records, recorder, fitted = fit(module, *all_three(), precision="64-true", max_steps=-1, max_epochs=1)
    assert fitted.global_step == 5 + 5 // period
    assert list(recorder.updates) == [0, 1, 2, 3, 4]
    for step, updates in recorder.updates.items():
        assert ("wide.weight" in updates) == (period == 1 or step % 2 == 1)
    assert_all(records, recorder.weights, recorder.updates)


def test_manual_optimization_that_toggles_optimizers() -> None:
    """As in adversarial training: while one optimizer works, the parameters of the other take no gradient."""

    class Toggles(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers():
                with self.toggled_optimizer(optimizer):
                    optimizer.zero_grad()
                    self.manual_backward(Pair.training_step(self, batch, batch_idx))
                    optimizer.step()

    module = Toggles(partial(AdamW, lr=0.02, weight_decay=0.5), partial(SGD, lr=0.1, momentum=0.9))
    records, recorder, _ = fit(module, *all_three(), precision="64-true", max_steps=-1, max_epochs=1)
    assert all({*PAIR_MATRICES} <= set(updates) for updates in recorder.updates.values())
    assert_all(records, recorder.weights, recorder.updates)


def test_manual_optimization_that_skips_steps() -> None:
    """A batch without any step is none for the monitors."""

    class Sometimes(Pair):
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    module = Sometimes(adamw)
    records, recorder, _ = fit(module, *all_three(), batches=6, precision="64-true", max_steps=-1, max_epochs=1)
    assert list(recorder.updates) == [2, 5]
    assert_all(records, recorder.weights, recorder.updates)


def test_compiled_submodules_have_their_own_names() -> None:
    class Compiled(Pair):
        def configure_model(self) -> None:
            self.tall = torch.compile(self.tall, backend="eager")

    class MuonCompiled(MuonPair):
        configure_model = Compiled.configure_model

    for module in (Compiled(adamw), MuonCompiled()):
        records, recorder, _ = fit(module, *all_three(), precision="64-true")
        assert_all(records, recorder.weights, recorder.updates)


def test_validation_in_the_middle_of_an_epoch_measures_nothing_more() -> None:
    class Validated(Pair):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten()))

    records, recorder, _ = fit(
        Validated(adamw),
        *all_three(),
        precision="64-true",
        limit_val_batches=2,
        val_check_interval=2,
        max_steps=-1,
        max_epochs=2,
    )
    assert any("val_loss" in row for _, row in records.rows)
    assert_all(records, recorder.weights, recorder.updates)


def test_monitors_together_log_what_each_logs_alone() -> None:
    """They share their work."""
    together, _, _ = fit(MuonZoo(), *all_three(), max_steps=4)
    alone: set[str] = set()
    for monitor in all_three():
        records, _, _ = fit(MuonZoo(), monitor, max_steps=4)
        for key in records.watched():
            rel = 0.02 if key.startswith(("spectral_norm", "stable_rank", "update_stable_rank")) else 1e-6
            assert together.series(key) == pytest.approx(records.series(key), rel=rel), key
        alone |= records.watched()
    assert together.watched() == alone


def test_a_second_fit_starts_anew() -> None:
    """Of the same callbacks on another module."""
    monitors = all_three()
    fit(Zoo(adamw), *monitors)
    records, recorder, _ = fit(Pair(adamw), *monitors, precision="64-true")
    assert_all(records, recorder.weights, recorder.updates)
